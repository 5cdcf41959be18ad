"""Training frameworks that a recipe of a few lines does not cover. Nothing here is imported by `import attrreg`."""
