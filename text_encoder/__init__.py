"""Prompts to context: CLIP's text tower and its tokenizer."""

from text_encoder.clip import TextEncoder, TextEncoderConfig
from text_encoder.tokenizer import Tokenizer

__all__ = ["TextEncoder", "TextEncoderConfig", "Tokenizer"]
