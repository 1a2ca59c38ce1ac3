"""Prompts to context: CLIP's text tower, its tokenizer, and what a prompt's text means."""

from text_encoder.clip import TextEncoder, TextEncoderConfig
from text_encoder.prompt import encode_prompts
from text_encoder.tokenizer import Tokenizer

__all__ = ["TextEncoder", "TextEncoderConfig", "Tokenizer", "encode_prompts"]
