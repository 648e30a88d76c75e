"""What a run has to say, for people: an HTML report, a table for the terminal, a model card.

It reads the JSON files of a run folder and nothing else, so that a report can be made wherever the folder is, without a
model and without torch.
"""
