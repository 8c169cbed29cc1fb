"""The version of all three distributions, and their addresses, which a release sets once."""

__version__ = "0.1.0"

# Empty until there is one: metadata, links for editing and the site's own address follow from these two.
__repository__ = ""
__site__ = ""
