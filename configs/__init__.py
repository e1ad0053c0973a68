"""Recipes: one complete TOML file per data set and family, read as package data."""
