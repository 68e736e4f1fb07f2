"""What transformers loads for `custom_generate`: it imports a copy of this file."""

from kvcompress.generation import generate as generate
