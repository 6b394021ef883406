"""Weights to start pretraining from: both towers of an earlier run, or the image side of a classifier."""

from internimage import Classifier, InternImage
from internimage.checkpoints import Report, load_checkpoint
from internimage.dense import offer_named
from internimage.hub import locate
from internimage.layouts import Layout, find_layout, official_or_same
from internimage.loading import fit, no_layer_scale, same_variant
from internimage.weight_files import WeightFile, read_weights
from tasks.base import InitCheckpoint
from tasks.pretraining.towers import Towers

# What belongs to the objective that a run was trained with.
_SIMILARITY = frozenset({"log_scale", "bias"})


def load_towers(towers: Towers, init: InitCheckpoint) -> Report:
    """Load what `init` names, or raise and leave the towers as they were.

    A file with a text tower gives all of both. Any other file, and with `head="new"` every file, gives the backbone and
    the head as to a classifier, whose logits the embedding stands for; the text tower then keeps its weights.

    Raises:
        CheckpointError: As of `load_checkpoint`.
    """
    if init.head == "load" and isinstance(towers.backbone, InternImage):
        file = read_weights(locate(init.source))
        layout = find_layout(file)
        if any(key.startswith("text.") for key in layout.model_keys()):
            return _load_both(towers, file, layout, init)
    return load_checkpoint(
        Classifier(towers.backbone, towers.embed_dim, lambda widths, length: towers.head),
        init.source,
        head=init.head,
        label_map=init.label_map,
        new_head_scale=init.new_head_scale,
        allow_missing=init.allow_missing,
        allow_unexpected=init.allow_unexpected,
    )


def _load_both(towers: Towers, file: WeightFile, layout: Layout, init: InitCheckpoint) -> Report:
    assert isinstance(towers.backbone, InternImage)
    config = towers.backbone.config
    built = same_variant(file, layout, config)
    theirs, own = layout.model_keys(), towers.state_dict().keys()
    # Another objective starts from its own scale and bias.
    if other_objective := _SIMILARITY & theirs.keys() != _SIMILARITY & own:
        theirs = {key: name for key, name in theirs.items() if key not in _SIMILARITY}
    offer = offer_named(file, layout, {official_or_same(key, config): name for key, name in theirs.items()})
    offer.adapt_center(config)
    scale_free = no_layer_scale(offer, config)

    def why_missing(key: str) -> str | None:
        return "the file is of another objective" if other_objective and key in _SIMILARITY else scale_free(key)

    return fit(
        towers,
        offer,
        {official_or_same(key, config): key for key in own},
        built=f"two towers on {built}",
        why_missing=why_missing,
        advise=lambda misfit: None,
        allow_missing=init.allow_missing,
        allow_unexpected=init.allow_unexpected,
    )
