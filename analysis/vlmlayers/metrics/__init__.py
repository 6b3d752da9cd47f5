"""Metrics: plain functions, arrays in, numbers out, and the table that declares them all."""

from __future__ import annotations

from vlmlayers.metrics.agreement import calibrated, cka, mutual_knn, procrustes, rsa
from vlmlayers.metrics.attention import attention_distance, attention_entropy
from vlmlayers.metrics.cka_matrix import cka_matrix
from vlmlayers.metrics.class_level import (
    fisher_ratio,
    h_score,
    lda_criterion,
    neighbourhood_overlap,
    silhouette,
    zero_shot_accuracy,
)
from vlmlayers.metrics.dataset_level import balanced_accuracy, confusion, normalised_accuracy
from vlmlayers.metrics.gap import (
    centroid_gap,
    frechet_gap,
    matched_cosine,
    pair_distance,
    retrieval,
    rmg,
)
from vlmlayers.metrics.geometry import (
    alignment,
    effective_rank,
    mean_cosine,
    mean_cosine_centred,
    participation_ratio,
    spectral_entropy,
    twonn,
    uniformity,
)
from vlmlayers.metrics.readouts import k_nearest, logistic, nearest_mean
from vlmlayers.metrics.separability import modality_auc
from vlmlayers.metrics.table import METRICS, Metric, metric, table
from vlmlayers.metrics.transfer import transfer_predict
from vlmlayers.metrics.transferability import logme

__all__ = [
    "METRICS",
    "Metric",
    "alignment",
    "attention_distance",
    "attention_entropy",
    "balanced_accuracy",
    "calibrated",
    "centroid_gap",
    "cka",
    "cka_matrix",
    "confusion",
    "effective_rank",
    "fisher_ratio",
    "frechet_gap",
    "h_score",
    "k_nearest",
    "lda_criterion",
    "logistic",
    "logme",
    "matched_cosine",
    "mean_cosine",
    "mean_cosine_centred",
    "metric",
    "modality_auc",
    "mutual_knn",
    "nearest_mean",
    "neighbourhood_overlap",
    "normalised_accuracy",
    "pair_distance",
    "participation_ratio",
    "procrustes",
    "retrieval",
    "rmg",
    "rsa",
    "silhouette",
    "spectral_entropy",
    "table",
    "transfer_predict",
    "twonn",
    "uniformity",
    "zero_shot_accuracy",
]
