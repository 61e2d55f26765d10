"""The mesh, what lives where on it, and the settings of the process."""
