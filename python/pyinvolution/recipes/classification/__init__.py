"""Image classification: the recipe, data in ImageFolder trees, the digits and the demonstration."""
