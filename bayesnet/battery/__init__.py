"""The statistical battery: checks against exact answers, and the faults that each must reject."""
