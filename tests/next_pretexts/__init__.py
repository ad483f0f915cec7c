"""The pretexts that a suite like this one gets next, each as a package outside it would bring it: one file, one YAML.

They are in the size of a test, close enough to their papers to need what those need: an answer for each place of the
image, a class for each image, a network over patches, labels that are computed between epochs.
"""

from next_pretexts import colorization, cpc_v2, exemplar, self_labelling  # noqa: F401  (registers the components)
