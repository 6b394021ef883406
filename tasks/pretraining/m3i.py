"""An objective in the manner of M3I (arXiv:2211.09807): images, texts and classes are predicted from mixed images.

The authors published no code. What their paper leaves open follows SiameseIM (arXiv:2206.01204), MixMIM
(arXiv:2205.13137) and the head of the released InternImage-H and G; numbers are this project's.

Shapes: B batch, H W image size, N tokens of a view, V visible ones, C their channels, D length of an embedding.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.batch import ImageTextBatch
from internimage import ClipProjectorHead
from tasks.pretraining.contrastive import clip_loss
from tasks.pretraining.m3i_category import Categories
from tasks.pretraining.m3i_decoder import Decoder
from tasks.pretraining.m3i_dense import dense_loss, spread
from tasks.pretraining.m3i_mixing import Mixed, mix, of_partner
from tasks.pretraining.m3i_positions import grid_positions, relative_positions
from tasks.pretraining.m3i_target import MomentumTarget, momentum_at
from tasks.pretraining.objectives import Meters, Objective
from tasks.pretraining.towers import Towers


class M3I(Objective):
    """Mixed images predict the tokens of both images, their texts and their classes.

    Each image is mixed with its partner, cell by cell. From its visible tokens a decoder predicts all tokens of the
    same view of the image; from those of the partner, all tokens of the partner's other view. The pooled vector of the
    mixed image is compared with the texts and the classes of both, each for its share of the cells.

    A term of weight 0 is not computed, and what only it needs is neither built nor trained. An input counts only where
    both of its images are valid.

    Args:
        same_view_weight: Weight of the tokens of the same view, at least 0, as all weights.
        other_view_weight: Weight of the tokens of the other view; above 0, data has to have two views.
        text_weight: Weight of `clip_loss`.
        category_weight: Weight of the cross entropy over classes, of samples that have a label.
        mix_ratio: Share of the partner in an image, in (0, 1).
        momentum: Share of the old average that the targets keep at the first step, 0 to 1; it rises to 1.
        decorrelation: Factor on the part of the token loss that keeps targets different, at least 0.
        decoder_dim: Channels of the decoder; divisible by 4 and by `decoder_heads`.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Heads of its attention.
        initial_scale: First factor on cosine similarities, above 0; it is learnt.

    Raises:
        ValueError: An argument is out of its range, or all weights are 0.
    """

    decoder: Decoder | None
    target: MomentumTarget | None
    categories: Categories | None
    kept: Tensor

    def __init__(
        self,
        same_view_weight: float = 1.0,
        other_view_weight: float = 1.0,
        text_weight: float = 1.0,
        category_weight: float = 1.0,
        mix_ratio: float = 0.5,
        momentum: float = 0.996,
        decorrelation: float = 0.02,
        decoder_dim: int = 512,
        decoder_depth: int = 4,
        decoder_heads: int = 16,
        initial_scale: float = 1 / 0.07,
    ) -> None:
        super().__init__()
        self.weights = {
            "same_view": same_view_weight,
            "other_view": other_view_weight,
            "text": text_weight,
            "category": category_weight,
        }
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise ValueError(f"M3I: the weights are {self.weights}, expected at least 0, and one of them above.")
        if not 0 < mix_ratio < 1:
            raise ValueError(f"M3I: mix_ratio is {mix_ratio}, expected a share between 0 and 1.")
        if not 0 <= momentum <= 1:
            raise ValueError(f"M3I: momentum is {momentum}, expected 0 to 1, for example 0.996.")
        if decorrelation < 0:
            raise ValueError(f"M3I: decorrelation is {decorrelation}, expected at least 0.")
        if initial_scale <= 0:
            raise ValueError(f"M3I: initial_scale is {initial_scale}, expected a number above 0.")
        self.num_views = 2 if other_view_weight else 1
        self.mix_ratio = mix_ratio
        self.momentum = momentum
        self.decorrelation = decorrelation
        self.decoder_dim, self.decoder_depth, self.decoder_heads = decoder_dim, decoder_depth, decoder_heads
        self.initial_scale = initial_scale
        self.decoder = self.target = self.categories = None
        # At the last update: a buffer, so that a resumed run logs it too.
        self.register_buffer("kept", torch.tensor(float(momentum)))
        self._meters: Meters = {}

    def build(self, towers: Towers, num_classes: int | None) -> None:
        head = _head(towers)
        towers.start_scale(self.initial_scale)
        if self._predicts_tokens:
            self.decoder = Decoder(
                head.project3.out_channels, dim=self.decoder_dim, depth=self.decoder_depth, num_heads=self.decoder_heads
            )
            self.target = MomentumTarget(towers.backbone, head)
        if self.weights["category"]:
            if num_classes is None:
                raise ValueError(
                    f"M3I: category_weight is {self.weights['category']} and the data has no classes. Set it to 0, or "
                    "num_classes of the data."
                )
            self.categories = Categories(num_classes, head.fc.out_features)
        # What no term trains is frozen: DistributedDataParallel waits for every gradient.
        if not self.weights["text"]:
            towers.text.requires_grad_(False)
        if not self._compares_vectors:
            for part in (head.pool, head.fc_norm, head.fc):
                part.requires_grad_(False)
            towers.log_scale.requires_grad_(False)

    def losses(self, towers: Towers, batch: ImageTextBatch) -> dict[str, Tensor]:
        head = _head(towers)
        mixed = mix(batch["image"], self.mix_ratio, towers.backbone.strides[-2])
        tokens = head.tokens(towers.backbone(mixed.image))  # (B, C, h, w)
        counts = batch["valid"] & of_partner(batch["valid"])
        terms: dict[str, Tensor] = {}
        self._meters = {}
        if self._predicts_tokens:
            terms |= self._token_terms(towers, batch, mixed, tokens, counts.float())
        if self._compares_vectors:
            vector = head.fc(head.pool_tokens(tokens)).float()  # (B, D)
            self._meters |= {"scale": towers.scale().detach(), "image_norm": vector.detach().norm(dim=-1).mean()}
            terms |= self._vector_terms(towers, batch, mixed.share, towers.unit(vector), counts)
        return {name: self.weights[name] * term for name, term in terms.items()}

    def after_step(self, towers: Towers, step: int, total_steps: int) -> None:
        if self.target is not None:
            kept = momentum_at(step, total_steps, self.momentum)
            self.target.update(towers.backbone, towers.head, kept)
            self.kept.fill_(kept)

    def meters(self) -> Meters:
        return self._meters

    @property
    def _predicts_tokens(self) -> bool:
        return bool(self.weights["same_view"] or self.weights["other_view"])

    @property
    def _compares_vectors(self) -> bool:
        return bool(self.weights["text"] or self.weights["category"])

    def _token_terms(
        self, towers: Towers, batch: ImageTextBatch, mixed: Mixed, tokens: Tensor, counts: Tensor
    ) -> dict[str, Tensor]:
        """Return the terms of the tokens of the same and of the other view, of those two that are on."""
        assert self.decoder is not None
        assert self.target is not None
        self.target.start(towers.backbone, _head(towers))
        height, width = tokens.shape[2:]
        grid = grid_positions(height, width, tokens.device)
        sequence = tokens.flatten(2).transpose(1, 2)  # (B, N, C)
        terms, spreads = {}, []
        for name, image, visible, wanted in self._questions(batch, mixed, grid, height, width):
            index = visible[..., None].expand(-1, -1, sequence.shape[-1])
            prediction = self.decoder(sequence.gather(1, index), grid[visible], wanted)
            target = self.target(image)
            terms[name] = dense_loss(prediction, target, counts, decorrelation=self.decorrelation)
            spreads.append(spread(target, counts))
        self._meters |= {"momentum": self.kept.clone(), "target_std": torch.stack(spreads).mean()}
        return terms

    def _questions(
        self, batch: ImageTextBatch, mixed: Mixed, grid: Tensor, height: int, width: int
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Yield of each token term its name, the image to predict, the visible tokens, and the wanted positions."""
        if self.weights["same_view"]:
            # A view in itself: its own grid, at the same size.
            yield "same_view", batch["image"], mixed.own, F.pad(grid, (0, 2)).expand(len(mixed.own), -1, -1)
        if self.weights["other_view"]:
            if "other_image" not in batch or "view" not in batch:
                raise ValueError(
                    "M3I: other_view_weight is above 0 and the batch lacks `other_image` or `view`. Choose a training "
                    "transform that makes two views, or set other_view_weight to 0."
                )
            view, other = of_partner(batch["view"]).unbind(1)
            wanted = relative_positions(view, other, height, width)
            yield "other_view", of_partner(batch["other_image"]), mixed.partner, wanted

    def _vector_terms(
        self, towers: Towers, batch: ImageTextBatch, share: float, unit: Tensor, counts: Tensor
    ) -> dict[str, Tensor]:
        """Return the terms of texts and classes, of those two that are on; `share` is that of the partner."""
        terms = {}
        if self.weights["text"]:
            text = towers.embed_text(batch["text"], batch["text_length"])
            self._meters["text_norm"] = text.detach().norm(dim=-1).mean()
            text = towers.unit(text)
            # All images show the same share of their partners, so that a target of two right answers is a sum of two.
            own, partner = (clip_loss(unit, answers, towers.scale(), counts) for answers in (text, of_partner(text)))
            terms["text"] = (1 - share) * own + share * partner
        if self.categories is not None:
            label = batch["label"]
            terms["category"] = self.categories(
                torch.cat([unit, unit]),
                torch.cat([label, of_partner(label)]),
                torch.cat([counts * (1 - share), counts * share]),
                towers.scale(),
            )
        return terms


def _head(towers: Towers) -> ClipProjectorHead:
    """Return the head, whose tokens and pooled vector are both needed.

    Raises:
        ValueError: It is another one.
    """
    if not isinstance(towers.head, ClipProjectorHead):
        raise ValueError(
            f"M3I: the head is a {type(towers.head).__name__}, expected a ClipProjectorHead, which makes tokens. Set "
            "head to internimage.ClipProjectorHead."
        )
    return towers.head
