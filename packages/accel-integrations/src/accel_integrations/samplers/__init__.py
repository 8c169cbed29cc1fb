"""Samplers that decide which samples meet in a batch."""

from .length_grouped_sampler import LengthGroupedSampler as LengthGroupedSampler
