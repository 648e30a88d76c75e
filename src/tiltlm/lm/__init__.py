"""Language models: loading, drawing, scoring. The only folder that imports transformers and peft."""
