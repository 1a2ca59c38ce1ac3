"""One digest of all that a model is beside its weights."""

import hashlib
import json
from functools import partial

from pydantic import BaseModel

from pipelines.loading import Model

TOLD_APART = {"prediction_type", "class_name", "use_karras_sigmas", "use_exponential_sigmas"}
"""Of a scheduler's config, what a picture's record tells as its prediction, sampler and spacing."""


def configs_sha256(model: Model) -> str:
    """One digest of what the configs of all parts say, but for `TOLD_APART`, and of the tokenizer's files.

    Raises:
        OSError: a file of the tokenizer is there no more.
    """
    # Without the defaults, so that what a later version adds to a config changes no digest.
    dump = partial(BaseModel.model_dump, mode="json", exclude_defaults=True)
    files = [file for file in model.tokenizer_folder.iterdir() if file.suffix in (".json", ".txt")]
    said = {
        "unet": dump(model.unet.config),
        "vae": dump(model.autoencoder.config),
        "text_encoder": dump(model.text_encoder.config),
        "scheduler": dump(model.scheduler, exclude=TOLD_APART),
        "tokenizer": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
