"""The posterior of a target, exactly where its completions can be listed."""
