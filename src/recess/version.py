"""The version of this package, apart from it so that no room needs the package's own names."""

__version__ = "0.1.0"
