"""Noise-conditional latent rewards (DRM): a preference model on noisy latents, its training, and sampling by it."""

from __future__ import annotations

from tempflow.latent_reward.model import EMBEDDED, LatentReward, RewardSpec, bind
from tempflow.latent_reward.score import Guided, LatentScorer, guided_sample
from tempflow.latent_reward.siblings import siblings
from tempflow.latent_reward.train import (
    Bucket,
    Rated,
    RewardTraining,
    accuracy,
    bradley_terry,
    fit,
    pairs_of,
    train_latent_reward,
)

__all__ = [
    "EMBEDDED",
    "Bucket",
    "Guided",
    "LatentReward",
    "LatentScorer",
    "Rated",
    "RewardSpec",
    "RewardTraining",
    "accuracy",
    "bind",
    "bradley_terry",
    "fit",
    "guided_sample",
    "pairs_of",
    "siblings",
    "train_latent_reward",
]
