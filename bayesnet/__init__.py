"""Image classifiers that know what they do not know: a CNN with a Bayesian head, beside its deterministic twin.

Importing the package loads no torch: public names are resolved when they are first used (PEP 562).
"""

__version__ = "0.1.0"
