"""The rules behind the findings, by what they look at; each is one function of an objective."""
