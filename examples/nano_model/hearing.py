"""What training needs to hear: log-mel frames and soft tokens, and losses that teach what was said.

Three lessons hang on the audio tower through layers that are thrown away afterwards: which sound is being
made at each soft token, as the synthesizer says; the characters of the sentence in order (connectionist
temporal classification); and, at the soft token where a word has just been said, the word. The last one is
asked of the soft tokens themselves, against the text model's own embeddings: what is heard comes to look like
what is read, and a decoder that can read can hear. Without lessons the tower would have to learn sounds, and
the decoder where in a clip it is, both from the same answer at its end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma4ForConditionalGeneration
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor

from .rooms import disturb
from .speech import PHONEMES

ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789:"  # a character's number is its place, from 1
FRAME, HOP, TOKEN = 320, 160, 640  # samples
MAX_FRAMES = 768
MAX_SAMPLES = MAX_FRAMES * HOP  # 7.68 s


def frames(samples: int) -> int:
    """Log-mel frames of a clip that transformers' feature extractor counts as valid."""
    return max(0, -(-(samples - HOP) // HOP))


def soft_tokens(samples: int) -> int:
    """Soft tokens of a clip: two convolutions of stride 2."""
    return -(-frames(samples) // 4)


class LogMel(torch.nn.Module):
    """transformers' Gemma 4 feature extractor for a batch: (clips, samples) -> (clips, frames, 128)."""

    def __init__(self) -> None:
        super().__init__()
        extractor = Gemma4AudioFeatureExtractor()
        assert (extractor.frame_length, extractor.hop_length) == (FRAME, HOP)
        self.size, self.floor = extractor.fft_length, float(extractor.mel_floor)
        self.register_buffer("window", torch.from_numpy(extractor.window))
        self.register_buffer("filters", torch.from_numpy(extractor.mel_filters).float())

    def forward(self, clips: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Frames, and which of them are valid (clips, frames)."""
        padded = F.pad(clips, (FRAME // 2, FRAME))
        count = clips.shape[1] // HOP
        cut = padded.unfold(1, FRAME, HOP)[:, :count] * self.window
        spectrum = torch.fft.rfft(cut, self.size).abs()
        mel = torch.log(spectrum @ self.filters + self.floor)
        valid = torch.arange(count, device=clips.device) < ((samples - HOP + HOP - 1) // HOP)[:, None]
        return mel * valid[:, :, None], valid


class Teacher(torch.nn.Module):
    """Sounds and characters from the tower's output (width), words from the soft tokens (hidden)."""

    def __init__(self, width: int, hidden: int, sounds: int, characters: int) -> None:
        super().__init__()
        self.silence = torch.nn.Linear(hidden, 1)  # no word ends here
        self.sharpness = torch.nn.Parameter(torch.tensor(0.0))  # log
        self.sounds = torch.nn.Linear(width, sounds + 1)
        self.characters = torch.nn.Linear(width, characters + 1)

    def losses(self, heard: Tensor, mask: Tensor, sounds: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
        """`heard`: (clips, tokens, width), `mask`: which count; `sounds`: (clips, tokens) classes, `said`:
        (clips, chars), 0 behind.
        """
        made = F.cross_entropy(self.sounds(heard[mask].float()), sounds[mask])
        used = mask.any(1)
        scores = self.characters(heard[used].float()).log_softmax(-1).transpose(0, 1)
        texts = said[used]
        spelled = F.ctc_loss(scores, texts, mask[used].sum(1), (texts > 0).sum(1), zero_infinity=True)
        return made, spelled

    def words_loss(self, soft: Tensor, words: Tensor, embeddings: Tensor) -> Tensor:
        """`soft` (tokens, hidden) against the word known at each (tokens,), 0 for none."""
        normal = F.rms_norm(soft.float(), soft.shape[1:])
        table = F.normalize(embeddings.detach().float(), dim=1)
        scores = (normal @ table.T) * self.sharpness.exp()
        scores = torch.cat((self.silence(normal), scores[:, 1:]), 1)  # the pad token stands for none
        return F.cross_entropy(scores, words)


def hear(model: Gemma4ForConditionalGeneration, mel: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(tower's output (clips, tokens, width), which of it counts, soft tokens in order (tokens, hidden))."""
    out = model.model.audio_tower(mel, valid)
    heard, mask = out.last_hidden_state, out.attention_mask
    return heard, mask, model.model.embed_audio(heard[mask])


class Classroom(torch.nn.Module):
    """Everything between clean clips and what they teach; only its soft tokens are needed afterwards."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.mel = LogMel()
        self.teacher = Teacher(width, hidden, len(PHONEMES), len(ALPHABET))

    def forward(
        self, model: Gemma4ForConditionalGeneration, batch: dict[str, Tensor], seed: int, strength: float
    ) -> tuple[Tensor, Tensor]:
        """(soft tokens in order (tokens, hidden), losses (3,): of sounds, spelling and words)."""
        with torch.autocast(batch["clips"].device.type, enabled=False):
            clips = disturb(batch["clips"].float() / 32768, batch["samples"], seed, strength)
            frames, valid = self.mel(clips, batch["samples"])
        heard, mask, soft = hear(model, frames, valid)
        made, spelled = self.teacher.losses(heard, mask, batch["sounds"], batch["said"])
        with torch.autocast(batch["clips"].device.type, enabled=False):
            table = model.model.language_model.embed_tokens.weight
            known = self.teacher.words_loss(soft, batch["words"][mask], table)
        return soft, torch.stack((made, spelled, known))
