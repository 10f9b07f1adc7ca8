"""What pictures show: media, uint8 [N, H, W, 3] on the CPU, to importance maps and to embeddings."""

from __future__ import annotations

from tempflow.perception.dino import DinoFeatures
from tempflow.perception.embed import DinoEmbedding, Embedding, HandEmbedding
from tempflow.perception.hand import HandFeatures
from tempflow.perception.maps import FeatureMaps, MapProvider
from tempflow.perception.pictures import DenseFeatures, Pictures

__all__ = [
    "DenseFeatures",
    "DinoEmbedding",
    "DinoFeatures",
    "Embedding",
    "FeatureMaps",
    "HandEmbedding",
    "HandFeatures",
    "MapProvider",
    "Pictures",
]
