"""The pages of the documentation that are made from the code and the results, so that they are never out of date."""
