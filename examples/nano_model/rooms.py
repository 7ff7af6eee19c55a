"""What a microphone in a room makes of clean speech: reverberation, noise, gain; batched and seeded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .speech import RATE_HZ

ROOM_S = 0.45  # longest reverberation that is kept


def disturb(clips: Tensor, samples: Tensor, seed: int, strength: float = 1.0) -> Tensor:
    """(clips, samples) float, clean, of which `samples` (clips,) count -> as heard, peak below 1.

    `strength` from 0 to 1: how many of the clips meet each kind of disturbance.
    """
    device, (count, length) = clips.device, clips.shape
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=generator, device=device)

    def chance(share: float) -> Tensor:
        return torch.rand(count, 1, generator=generator, device=device) < share * strength

    size = 1 << (length + int(ROOM_S * RATE_HZ) - 1).bit_length()
    spectrum = torch.fft.rfft(clips, size)

    # A room: decaying noise after the direct sound.
    time_s = torch.arange(int(ROOM_S * RATE_HZ), device=device) / RATE_HZ
    noise = torch.randn(count, len(time_s), generator=generator, device=device)
    room = noise * torch.exp(-6.9 * time_s / uniform(0.05, 0.5))
    room = room * uniform(0.05, 0.6) / room.square().sum(1, keepdim=True).sqrt()
    room = room * chance(0.5)
    room[:, 0] = 1.0
    spectrum = spectrum * torch.fft.rfft(room, size)

    # A cheap microphone: less of the lows and the highs.
    frequency = torch.fft.rfftfreq(size, 1 / RATE_HZ, device=device) + 1.0
    low, high = uniform(20, 300), uniform(3500, 9000)
    channel = 1 / ((1 + (low / frequency) ** 4) * (1 + (frequency / high) ** 4)).sqrt()
    spectrum = spectrum * torch.where(chance(0.4), channel, torch.ones_like(channel))
    heard = torch.fft.irfft(spectrum, size)[:, :length]

    # Noise whose power falls with frequency, 5 to 35 dB below the speech.
    inside = torch.arange(length, device=device) < samples[:, None]
    loudness = ((heard * inside).square().sum(1, keepdim=True) / samples[:, None].clamp_min(1)).sqrt()
    white = torch.fft.rfft(torch.randn(count, length, generator=generator, device=device), size)
    slope = torch.randint(0, 3, (count, 1), generator=generator, device=device) * 0.5
    background = torch.fft.irfft(white / (frequency + 20.0) ** slope, size)[:, :length]
    background = background / background.square().mean(1, keepdim=True).sqrt()
    level = loudness * 10 ** (-uniform(5, 35) / 20)
    heard = heard + background * level * chance(0.75)

    # A hum of the mains and its harmonics.
    hertz = 50.0 * torch.randint(1, 5, (count, 1), generator=generator, device=device)
    place = torch.arange(length, device=device) / RATE_HZ
    heard = heard + torch.sin(2 * math.pi * hertz * place) * level * uniform(0.3, 1.5) * chance(0.15)

    heard = heard * inside
    peak = heard.abs().amax(1, keepdim=True).clamp_min(1e-6)
    return heard / peak * 10 ** (-uniform(1, 26) / 20)
