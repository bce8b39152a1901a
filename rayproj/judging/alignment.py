"""How well an image is what its prompt says, by several measures, each through a model from a folder; the default ones need
no model but those that come with this package, and are named for what they are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.diffusion.text import TextConfig, TextEncoder
from rayproj.discovery.captions import FEATURE
from rayproj.errors import UserError
from rayproj.evaluation.clip import ClipScore
from rayproj.evaluation.folders import loading
from rayproj.evaluation.words import plain
from rayproj.judging import counting
from rayproj.judging.prompts import Question, QuestionKind, questions_of, read_questions, score

SHOWS = 'Does this figure show "{prompt}"? Please answer yes or no.'  # Lin et al. 2024, arXiv 2404.01291, section 3
NEIGHBOURS = 5
SAME = 1 - 1e-5  # cosine of the features from which an image is the known one


@dataclass
class AlignmentConfig:
    """By what the images of a prompt are judged."""

    clip: str = ""  # folder of a CLIP model of transformers: CLIPScore
    # Folder of a model of transformers that answers questions about images (AutoModelForImageTextToText with its processor,
    # such as LLaVA, PaliGemma or GIT): VQAScore, and the answers to the questions.
    answers: str = ""
    template: str = "{question}"  # what that model is given, such as "USER: <image>\n{question} ASSISTANT:"
    questions: str = ""  # file with the questions of each prompt, JSON lines; "": those that plain rules find
    # Without a model, what is in an image is told by the captions of the real images that are the most similar by
    # EfficientNet-lite0's features, by its colours and by counting what is connected: a dataset with images and
    # captions. "": neither.
    known: str = ""
    known_captions: str = "caption"  # the field with them

    def problems(self) -> list[str]:
        if "{question}" not in self.template:
            return ["judge.alignment.template must hold {question}."]
        return [] if self.answers or not self.questions or self.known else [
            "judge.alignment.questions needs somebody who answers: judge.alignment.answers or .known."
        ]  # fmt: skip


class Measure(Protocol):
    """One measure of alignment; higher is better.

    Attributes:
        share: whether it is a share or probability, from 0 to 1.
    """

    name: str
    share: bool

    def __call__(self, images: Tensor, features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float64 [B] of uint8 images [B, C, H, W], their EfficientNet-lite0 features [B, D] and prompts; NaN where the
        measure has nothing to say of a prompt."""
        ...


def measures(config: AlignmentConfig, index: str, device: str) -> list[Measure]:
    """The measures of a config, ready.

    Args:
        index: the dataset of `rayproj.discovery.captions.Indexer` over `config.known`; "" where that is "".

    Raises:
        UserError: a folder or file is not what it should be.
    """
    asked = read_questions(config.questions) if config.questions else {}
    found: list[Measure] = []
    if config.clip:
        found.append(_Clip(config.clip, device))
    if config.answers:
        model = AnsweringModel(config.answers, config.template, device)
        found += [VqaScore(model), Questions("questions (model)", model, asked), Counts("count (model)", model)]
    if config.known:
        known = KnownImages(index, device)
        found += [known, Questions("questions (retrieval)", known, asked), Counts("count (components)", known)]
    return found


class Answering(Protocol):
    """What answers questions about images."""

    def answer(self, image: Tensor, feature: np.ndarray, question: Question) -> str: ...


class _Clip:
    name = "CLIPScore"
    share = False

    def __init__(self, folder: str, device: str) -> None:
        self.clip = ClipScore(folder, device)

    def __call__(self, images: Tensor, features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return self.clip(images, prompts).double().cpu().numpy()


class AnsweringModel:
    """A model of transformers that takes an image and a text and goes on with it."""

    def __init__(self, folder: str, template: str, device: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.template, self.device = template, device
        wanted = "a model of transformers that takes an image and a text (image-text-to-text), and its processor"
        with loading(f"judge.alignment.answers='{folder}'", wanted):
            self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
        self.model = model.to(device).eval().requires_grad_(False)
        self.takes = inspect.signature(model.forward).parameters
        words = self.processor.tokenizer
        # "Yes" and "yes", as the first token of an answer, with and without the space before it: the first that says more
        # than a space, with which some tokenizers begin every answer.
        first = {
            next((t for t in words(word, add_special_tokens=False)["input_ids"] if words.decode([t]).strip()), None)
            for word in ("yes", "Yes", " yes", " Yes")
        }
        self.yes = [token for token in first if token not in (None, words.unk_token_id)]
        if not self.yes:
            raise UserError(
                f"judge.alignment.answers='{folder}': its tokenizer has no word for yes; give another model."
            )

    def _given(self, image: Tensor, question: str) -> Any:
        picture = image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
        text = self.template.format(question=question)
        given = self.processor(images=[picture], text=[text], return_tensors="pt").to(self.device)
        if "token_type_ids" not in self.takes:  # BERT's tokenizer gives them to any; Gemma 3 needs them
            given.pop("token_type_ids", None)
        return given

    @torch.no_grad()
    def probability_of_yes(self, image: Tensor, question: str) -> float:
        """That the answer begins with yes."""
        logits = self.model(**self._given(image, question)).logits[0, -1].float()
        return float(logits.softmax(0)[self.yes].sum())

    @torch.no_grad()
    def answer(self, image: Tensor, feature: np.ndarray, question: Question) -> str:
        given = self._given(image, question.text)
        out = self.model.generate(**given, max_new_tokens=8, do_sample=False)
        text: str = self.processor.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        return text.strip()


class VqaScore:
    """P("yes" | image, "Does this figure show …?") (Lin et al. 2024, arXiv 2404.01291, eq. 2)."""

    name = "VQAScore"
    share = True

    def __init__(self, model: AnsweringModel) -> None:
        self.model = model

    def __call__(self, images: Tensor, features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        pairs = zip(images, prompts, strict=True)
        return np.array([self.model.probability_of_yes(image, SHOWS.format(prompt=p)) for image, p in pairs])


class Questions:
    """The share of a prompt's questions that are answered rightly, as in Gecko and DSG.

    Args:
        asked: prompt -> its questions; of others, those that plain rules find.
    """

    share = True

    def __init__(self, name: str, by: Answering, asked: dict[str, list[Question]]) -> None:
        self.name, self.by, self.asked = name, by, asked

    def __call__(self, images: Tensor, features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return np.array([self._one(i, f, p) for i, f, p in zip(images, features, prompts, strict=True)])

    def _one(self, image: Tensor, feature: np.ndarray, prompt: str) -> float:
        questions = self.asked.get(prompt) or questions_of(prompt)
        return score(questions, {k: self.by.answer(image, feature, q) for k, q in enumerate(questions)})


class Counts:
    """Whether the number of things is the one of the prompt: GeckoNum's exact task; NaN of prompts without a number."""

    share = True

    def __init__(self, name: str, by: Answering) -> None:
        self.name, self.by = name, by

    def __call__(self, images: Tensor, features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        found = np.full(len(prompts), np.nan)
        for k, prompt in enumerate(prompts):
            asked = [q for q in questions_of(prompt) if q.kind is QuestionKind.count]
            if asked:
                free = [Question(q.text, q.answer, q.kind, q.about) for q in asked]  # of the number alone
                found[k] = score(free, {n: self.by.answer(images[k], features[k], q) for n, q in enumerate(free)})
        return found


class KnownImages:
    """The real images that are the most similar, and what their captions say.

    As a measure it is the mean cosine of the prompt and these captions, as sentences (all-MiniLM-L6-v2). It knows no more
    than EfficientNet-lite0's features of small images can tell, and nothing of how things are arranged.
    """

    name = "retrieval (EfficientNet-lite0, all-MiniLM-L6-v2)"
    share = False

    def __init__(self, index: str, device: str) -> None:
        dataset = Dataset.open(index)
        found = Reader(dataset).gather(np.arange(dataset.header.num_samples))
        self.captions, self.features = found["caption"], unit(found[FEATURE])
        self.encoder = TextEncoder(TextConfig(tokens=32), device)
        self._vectors: dict[str, np.ndarray] = {}

    def __call__(self, images: Tensor, features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        near = [[str(self.captions[i]) for i in row] for row in self.nearest(features)]
        wanted, told = self.vectors(list(prompts)), [self.vectors(texts) for texts in near]
        return np.array([float((t @ w).mean()) for w, t in zip(wanted, told, strict=True)])

    def nearest(self, features: np.ndarray) -> np.ndarray:
        """int64 [B, NEIGHBOURS]: the numbers of the most similar known images, the most similar first; an image that is
        known itself does not speak for itself."""
        similar = unit(features) @ self.features.T
        return np.argsort(-np.where(similar > SAME, -1.0, similar), axis=1, kind="stable")[:, :NEIGHBOURS]

    def vectors(self, texts: list[str]) -> np.ndarray:
        """Of length one, float64 [n, D]: means over the words."""
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        for begin in range(0, len(new), 64):
            part = new[begin : begin + 64]
            hidden = self.encoder(part)
            mean = hidden.sum(1) / (hidden.abs().sum(2) > 0).sum(1, keepdim=True).clamp(min=1)
            self._vectors |= dict(zip(part, unit(mean.double().cpu().numpy()), strict=True))
        return np.stack([self._vectors[text] for text in texts])

    def answer(self, image: Tensor, feature: np.ndarray, question: Question) -> str:
        if question.kind is QuestionKind.count:
            return str(counting.components(image.cpu().numpy()))
        if question.kind is QuestionKind.colour:
            return counting.main_colour(image.cpu().numpy())
        told = [plain(str(self.captions[i])) for i in self.nearest(feature[None])[0]]
        words = plain(question.about or question.text)
        said = any(re.search(rf"\b{re.escape(words)}(e?s)?\b", caption) for caption in told)
        return "yes" if said else "no"


def unit(vectors: np.ndarray) -> np.ndarray:
    """Of length one, along the last axis."""
    found: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return found
