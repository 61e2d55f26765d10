"""Pure functions of arrays that must be fast, one file per operation, each with its forms."""
