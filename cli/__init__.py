"""The command line of bayesnet: parse, call the workflow of the same name, render. Nothing here computes."""
