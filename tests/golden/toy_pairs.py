"""A datamodule of random images with random texts, as one from outside the project; each pair can be told by heart."""

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

# Token ids; a text is START, some of those above END, END, and zeros.
START, END, VOCABULARY, CONTEXT = 1, 2, 32, 8


class ToyPairs(LightningDataModule):
    """Pairs to train and to validate on; with classes, a second validation loader of labelled images and prompts."""

    def __init__(
        self, num_samples: int = 16, batch_size: int = 16, num_classes: int | None = None, views: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_classes = num_classes
        generator = torch.Generator().manual_seed(seed)
        self.pairs = [self._pair(i, views, generator) for i in range(num_samples)]
        self.class_prompts = None
        if num_classes is not None:
            prompts = [self._pair(i, 1, generator) for i in range(2 * num_classes)]
            ids = torch.stack([pair["text"] for pair in prompts]).view(num_classes, 2, CONTEXT)
            self.class_prompts = ids, torch.tensor([pair["text_length"] for pair in prompts]).view(num_classes, 2)

    def _pair(self, number: int, views: int, generator: torch.Generator):
        length = int(torch.randint(4, CONTEXT + 1, (), generator=generator))
        text = torch.zeros(CONTEXT, dtype=torch.int64)
        text[:length] = torch.randint(END + 1, VOCABULARY, (length,), generator=generator)
        text[0], text[length - 1] = START, END
        images = {"image": torch.randn(3, 32, 32, generator=generator)}
        if views == 2:
            images["other_image"] = torch.randn(3, 32, 32, generator=generator)
            images["view"] = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0], [0.1, 0.2, 0.5, 0.5, 1.0]])
        label = number % self.num_classes if self.num_classes is not None else -1
        place = {"label": label, "source": 0, "valid": True, "key": f"pair/{number}"}
        return {**images, "text": text, "text_length": length, **place}

    def train_dataloader(self):
        return DataLoader(self.pairs, batch_size=self.batch_size)

    def val_dataloader(self):
        pairs = DataLoader([{**pair, "label": -1} for pair in self.pairs], batch_size=self.batch_size)
        if self.num_classes is None:
            return pairs
        images = [{"image": pair["image"], "label": pair["label"]} for pair in self.pairs]
        return [pairs, DataLoader(images, batch_size=self.batch_size)]

    def predict_dataloader(self):
        # The last sample only fills up its batch.
        return DataLoader([*self.pairs, {**self.pairs[0], "valid": False}], batch_size=self.batch_size)
