"""The table of all metrics: what each takes, where it points, and what chance gives.

`scores` reads the protocol of a metric from `needs`; axis labels, captions, `vlmlayers score
--list`, the documentation and the property tests read the rest. A new metric is one function and
one entry. The first five arguments of an entry are function, level, needs, axis label, reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.metrics import agreement as ag
from vlmlayers.metrics import attention as at
from vlmlayers.metrics import class_level as cl
from vlmlayers.metrics import dataset_level as dl
from vlmlayers.metrics import gap, geometry, readouts, separability, transfer, transferability
from vlmlayers.metrics import model_level as ml
from vlmlayers.metrics.declare import INF, JOINT, MODEL, NEEDS, SIMILARITY, Metric
from vlmlayers.metrics.own import declared, packaged_metric
from vlmlayers.user_code import packaged

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["METRICS", "SHIPPED", "Metric", "find_metric", "metric", "table"]

GROUP = "vlmlayers.metrics"


# The formatter would give every argument a line of its own, and the table would not be one.
# fmt: off
METRICS: dict[str, Metric] = {
    # Dataset level
    "dataset_accuracy": Metric(
        readouts.logistic, "dataset", "datasets", "dataset accuracy (linear probe)",
        "MMA, Yang et al. 2024, Fig. 1", null="classes", direction="more dataset-specific",
        smallest_n=15, invariances=("scale", "translation"), takes=("normalise",),
        of_parts=readouts.logistic_of_parts, sensitive="rotation",
    ),
    "dataset_accuracy_ncm": Metric(
        readouts.nearest_mean, "dataset", "datasets", "dataset accuracy (nearest mean)",
        "Mensink et al. 2013", null="classes", direction="more dataset-specific", smallest_n=15,
        invariances=("scale", "translation"), takes=("normalise",), sensitive="rotation",
    ),
    "dataset_accuracy_knn": Metric(
        readouts.k_nearest, "dataset", "datasets", "dataset accuracy (k nearest)",
        "Cover and Hart 1967", null="classes", direction="more dataset-specific", smallest_n=15,
        invariances=("scale", "translation"), takes=("k", "normalise"), sensitive="rotation",
    ),
    "dataset_accuracy_lda": Metric(
        transfer.discriminant, "dataset", "datasets", "dataset accuracy (LDA)", "Fisher 1936",
        null="classes", direction="more dataset-specific", smallest_n=15,
        invariances=("rotation", "scale", "translation"), sensitive="columns",
    ),
    "dataset_recall": Metric(
        dl.recall, "dataset", "dataset confusion", "recall of the dataset",
        "MMA, Yang et al. 2024, Fig. 1", null="classes", direction="more dataset-specific",
        smallest_n=15, base="dataset_accuracy",
    ),
    "dataset_confusion": Metric(
        dl.confusion_shares, "dataset", "dataset confusion", "share predicted as another dataset",
        "MMA, Yang et al. 2024, Fig. 1", null="classes", direction="less dataset-specific",
        smallest_n=15, base="dataset_accuracy",
    ),
    "dataset_invariance": Metric(
        dl.invariance, "dataset", "dataset confusion", "1 − normalised dataset accuracy",
        "MMA, Yang et al. 2024, Fig. 1", null=1.0, direction="less dataset-specific",
        bounds=(0.0, 2.0), smallest_n=15, base="dataset_accuracy",
    ),
    "style_accuracy": Metric(
        readouts.logistic, "dataset", "styles", "style accuracy (same classes)",
        "Geirhos et al. 2019", null="classes", direction="more style-specific", smallest_n=15,
        towers=("vision",), invariances=("scale", "translation"), takes=("normalise",),
        of_parts=readouts.logistic_of_parts, sensitive="rotation",
    ),
    "cross_style_accuracy": Metric(
        readouts.nearest_mean, "dataset", "style classes", "class accuracy on another style",
        "Geirhos et al. 2019", null="classes", direction="more general", smallest_n=4,
        towers=("vision",), invariances=("scale", "translation"), takes=("normalise",),
        sensitive="rotation",
    ),
    "novel_class_accuracy": Metric(
        transfer.transfer_predict, "dataset", "novel classes",
        "accuracy on novel classes (few shots)", "Mensink et al. 2013", null="classes",
        direction="more general", smallest_n=6, towers=("vision",),
        parts=(transfer.within_scatter, transfer.few_shot_predict),
        invariances=("rotation", "scale", "translation"), takes=("shots",), sensitive="columns",
    ),
    "left_out_accuracy": Metric(
        transfer.transfer_predict, "dataset", "other datasets",
        "accuracy on a left-out dataset (few shots)", "Mensink et al. 2013", null="classes",
        direction="more general", smallest_n=6, towers=("vision",),
        parts=(transfer.within_scatter, transfer.few_shot_predict),
        invariances=("rotation", "scale", "translation"), takes=("shots",), sensitive="columns",
    ),
    # Class level
    "class_accuracy": Metric(
        readouts.logistic, "class", "class parts", "class accuracy (linear probe)",
        "Radford et al. 2021", null="classes", smallest_n=6, invariances=("scale", "translation"),
        takes=("normalise",), of_parts=readouts.logistic_of_parts, sensitive="rotation",
    ),
    "class_accuracy_ncm": Metric(
        readouts.nearest_mean, "class", "class parts", "class accuracy (nearest mean)",
        "Mensink et al. 2013", null="classes", smallest_n=6, invariances=("scale", "translation"),
        takes=("normalise",), sensitive="rotation",
    ),
    "class_accuracy_knn": Metric(
        readouts.k_nearest, "class", "class parts", "class accuracy (k nearest)",
        "Cover and Hart 1967", null="classes", smallest_n=6, invariances=("scale", "translation"),
        takes=("k", "normalise"), sensitive="rotation",
    ),
    "zero_shot_accuracy": Metric(
        cl.zero_shot_accuracy, "class", "prompts", "zero-shot accuracy", "Radford et al. 2021",
        null="classes", direction="better matched", spaces=JOINT, per_item=cl.zero_shot_values,
        invariances=("rotation", "scale"), sensitive="translation",
    ),
    "fisher_ratio": Metric(
        cl.fisher_ratio, "class", "labels", "Fisher ratio tr S_b / tr S_w", "Fisher 1936",
        bounds=(0.0, INF), null=cl.fisher_null, smallest_n=6, invariances=SIMILARITY,
        sensitive="columns",
    ),
    "lda_criterion": Metric(
        cl.lda_criterion, "class", "labels", "LDA criterion tr(S_w⁻¹ S_b)", "Fukunaga 1990",
        bounds=(0.0, INF), null="shuffle", smallest_n=6, invariances=SIMILARITY,
        sensitive="columns", takes=("width",),
    ),
    "silhouette": Metric(
        cl.silhouette, "class", "labels", "silhouette (Euclidean)", "Rousseeuw 1987",
        bounds=(-1.0, 1.0), null="shuffle", smallest_n=6, largest_n=2000,
        parts=(cl.distances, cl.mean_silhouette), invariances=SIMILARITY, sensitive="columns",
    ),
    "h_score": Metric(
        cl.h_score, "class", "labels", "H-score (shrunk)", "Ibrahim et al. 2021", bounds=(0.0, INF),
        null="shuffle", smallest_n=6, relabelled=cl.h_score_relabelled, invariances=SIMILARITY,
        sensitive="columns", takes=("width",),
    ),
    "logme": Metric(
        transferability.logme, "class", "labels", "LogME (log evidence per item)",
        "You et al. 2021", bounds=(-INF, INF), null="shuffle", smallest_n=6,
        relabelled=transferability.logme_relabelled, invariances=SIMILARITY, sensitive="columns",
    ),
    "neighbourhood_overlap": Metric(
        cl.neighbourhood_overlap, "class", "labels",
        "neighbours of the same class (share of items)", "Doimo et al. 2020",
        null=cl.same_label_null, smallest_n=6, largest_n=2000,
        parts=(cl.cosines, cl.same_label_share), most=cl.same_label_most,
        invariances=("rotation", "scale", "row order"), sensitive="translation", takes=("k",),
    ),
    # Agreement between positions and towers
    "cka_debiased": Metric(
        ag.cka, "agreement", "pairs", "CKA (linear, debiased)",
        "Kornblith et al. 2019; debiased by Song et al. 2012",
        bounds=(-1.0, 1.0), direction="more alike", null="shuffle", smallest_n=4, largest_n=400,
        parts=(ag.linear_kernel, ag.debiased_signature), invariances=SIMILARITY,
        sensitive="columns",
    ),
    "cka_biased": Metric(
        ag.cka, "agreement", "pairs", "CKA (linear, biased)", "Kornblith et al. 2019",
        direction="more alike", null="shuffle", smallest_n=4, largest_n=400,
        parts=(ag.linear_kernel, ag.biased_signature), invariances=SIMILARITY, sensitive="columns",
        settings={"debiased": False},
    ),
    "cka_rbf": Metric(
        ag.cka, "agreement", "pairs", "CKA (RBF, debiased)",
        "Kornblith et al. 2019; debiased by Song et al. 2012",
        bounds=(-1.0, 1.0), direction="more alike", null="shuffle", smallest_n=4, largest_n=400,
        parts=(ag.distance_kernel, ag.rbf_signature), invariances=SIMILARITY, sensitive="columns",
        settings={"kernel": "rbf"},
    ),
    "mutual_knn": Metric(
        ag.mutual_knn, "agreement", "pairs", "mutual k nearest neighbours", "Huh et al. 2024",
        direction="more alike", null="shuffle", smallest_n=6, largest_n=400,
        parts=(ag.cosine_kernel, ag.neighbour_signature),
        invariances=("rotation", "scale", "row order"), sensitive="translation", takes=("k",),
    ),
    "rsa": Metric(
        ag.rsa, "agreement", "pairs", "RSA (Spearman of distances)", "Kriegeskorte et al. 2008",
        bounds=(-1.0, 1.0), direction="more alike", null="shuffle", smallest_n=5, largest_n=300,
        parts=(ag.distance_kernel, ag.rank_signature), invariances=SIMILARITY, sensitive="columns",
    ),
    "procrustes": Metric(
        ag.procrustes, "agreement", "pairs", "angular Procrustes distance (rad)",
        "Williams et al. 2021", bounds=(0.0, 1.5707963267948966), direction="less alike",
        null="shuffle", smallest_n=4, largest_n=64, matrix=(ag.shapes, ag.shape_angles),
        invariances=SIMILARITY, sensitive="columns",
    ),
    # Modality gap
    "centroid_gap": Metric(
        gap.centroid_gap, "gap", "modalities", "centroid gap", "Liang et al. 2022",
        bounds=(0.0, 2.0), direction="wider gap", null=gap.centroid_gap_null, spaces=JOINT,
        weighted=gap.centroid_gap_weighted, invariances=("rotation", "scale"),
        sensitive="translation",
    ),
    "pair_distance": Metric(
        gap.pair_distance, "gap", "modalities", "text–image distance of pairs", "Liang et al. 2022",
        bounds=(0.0, 2.0), direction="wider gap", null="shuffle", spaces=JOINT,
        per_item=gap.pair_distances, invariances=("rotation", "scale"), sensitive="translation",
    ),
    "rmg": Metric(
        gap.rmg, "gap", "modalities", "relative modality gap", "Schrodi et al. 2025",
        direction="wider gap", null="shuffle", spaces=JOINT, weighted=gap.rmg_weighted,
        smallest_n=3, invariances=("rotation", "scale"), sensitive="translation",
    ),
    "matched_cosine": Metric(
        gap.matched_cosine, "gap", "modalities", "cosine of matching pairs", "Hessel et al. 2021",
        bounds=(-1.0, 1.0), direction="narrower gap", null="shuffle", spaces=JOINT,
        per_item=gap.pair_cosines, invariances=("rotation", "scale"), sensitive="translation",
    ),
    "frechet_gap": Metric(
        gap.frechet_gap, "gap", "modalities", "Fréchet distance, centroids aligned",
        "Dowson and Landau 1982", bounds=(0.0, INF), direction="wider gap", null=gap.frechet_null,
        spaces=JOINT, smallest_n=4, invariances=("rotation", "scale"), sensitive="translation",
    ),
    "modality_auc": Metric(
        separability.modality_auc, "gap", "modalities", "image against text (held-out AUC)",
        "Shi et al. 2023", direction="wider gap", null=0.5, spaces=JOINT, smallest_n=4,
        left_out=separability.modality_auc_left_out, invariances=("scale",), sensitive="rotation",
    ),
    "modality_auc_low": Metric(
        separability.modality_auc, "gap", "modalities", "image against text, 2 dimensions (AUC)",
        "Shi et al. 2023", direction="wider gap", null=0.5, spaces=JOINT, smallest_n=4,
        left_out=separability.modality_auc_left_out, settings={"dims": 2}, invariances=("scale",),
        sensitive="rotation",
    ),
    "retrieval_r1": Metric(
        gap.retrieval, "gap", "queries", "recall at 1", "Karpathy and Fei-Fei 2015",
        direction="better matched", null=gap.retrieval_null, spaces=JOINT, smallest_n=2,
        per_item=gap.retrieval_hits, settings={"k": 1}, invariances=("rotation", "scale"),
        sensitive="translation",
    ),
    "retrieval_r5": Metric(
        gap.retrieval, "gap", "queries", "recall at 5", "Karpathy and Fei-Fei 2015",
        direction="better matched", null=gap.retrieval_null, spaces=JOINT, smallest_n=6,
        per_item=gap.retrieval_hits, settings={"k": 5}, invariances=("rotation", "scale"),
        sensitive="translation",
    ),
    "retrieval_r10": Metric(
        gap.retrieval, "gap", "queries", "recall at 10", "Karpathy and Fei-Fei 2015",
        direction="better matched", null=gap.retrieval_null, spaces=JOINT, smallest_n=11,
        per_item=gap.retrieval_hits, settings={"k": 10}, invariances=("rotation", "scale"),
        sensitive="translation",
    ),
    # Geometry
    "effective_rank": Metric(
        geometry.effective_rank, "geometry", "features", "effective rank (RankMe)",
        "Garrido et al. 2023", bounds=(1.0, INF), direction="more directions", null="gaussian",
        smallest_n=4, parts=(geometry.spectrum, geometry.rank_of), invariances=SIMILARITY,
        sensitive="columns",
    ),
    "participation_ratio": Metric(
        geometry.participation_ratio, "geometry", "features", "participation ratio",
        "Gao et al. 2017", bounds=(1.0, INF), direction="more directions", null="gaussian",
        smallest_n=4, parts=(geometry.spectrum, geometry.participation_of), invariances=SIMILARITY,
        sensitive="columns",
    ),
    "spectral_entropy": Metric(
        geometry.spectral_entropy, "geometry", "features", "von Neumann entropy (nats)",
        "Skean et al. 2025", bounds=(0.0, INF), direction="more directions", null="gaussian",
        smallest_n=4, parts=(geometry.spectrum, geometry.entropy_of), invariances=SIMILARITY,
        sensitive="columns",
    ),
    "mean_cosine": Metric(
        geometry.mean_cosine, "geometry", "features", "mean cosine of items (raw)",
        "Ethayarajh 2019", bounds=(-1.0, 1.0), direction="more anisotropic", null=0.0,
        weighted=geometry.mean_cosine_weighted, invariances=("rotation", "scale", "row order"),
        sensitive="translation", smallest_n=3,
    ),
    "mean_cosine_centred": Metric(
        geometry.mean_cosine_centred, "geometry", "features", "mean cosine of items (centred)",
        "Cai et al. 2021", bounds=(-1.0, 1.0), direction="more anisotropic",
        null=geometry.centred_null, smallest_n=3, invariances=SIMILARITY, sensitive="columns",
    ),
    "uniformity": Metric(
        geometry.uniformity, "geometry", "features", "uniformity (log potential)",
        "Wang and Isola 2020", bounds=(-8.0, 0.0), direction="less uniform", smallest_n=3,
        largest_n=2000, null=geometry.uniformity_null, weighted=geometry.uniformity_weighted,
        invariances=("rotation", "scale", "row order"), sensitive="translation",
    ),
    "alignment": Metric(
        geometry.alignment, "geometry", "labels", "distance² within classes (alignment)",
        "Wang and Isola 2020", bounds=(0.0, 4.0), direction="less aligned", null="shuffle",
        smallest_n=4, weighted=geometry.alignment_weighted,
        relabelled=geometry.alignment_relabelled,
        invariances=("rotation", "scale", "row order"), sensitive="translation",
    ),
    "twonn": Metric(
        geometry.twonn, "geometry", "features", "intrinsic dimension (TwoNN)", "Facco et al. 2017",
        bounds=(0.0, INF), direction="more directions", null="gaussian", smallest_n=20,
        largest_n=2000, distinct=geometry.distinct, invariances=SIMILARITY, sensitive="columns",
    ),
    # What a block does in its model, by running it
    "skip_accuracy_drop": Metric(
        ml.accuracy_drops, "model", MODEL, "zero-shot accuracy lost without the block",
        "Veit et al. 2016", bounds=(-1.0, 1.0), direction="more important", null=0.0, spaces=JOINT,
    ),
    "skip_joint_change": Metric(
        ml.joint_changes, "model", MODEL, "change of joint features without the block (1 − cosine)",
        "Veit et al. 2016", bounds=(0.0, 2.0), direction="more important", null=0.0, spaces=JOINT,
    ),
    "mean_accuracy_drop": Metric(
        ml.accuracy_drops, "model", MODEL, "zero-shot accuracy lost when the block adds its mean",
        "Wang et al. 2023", bounds=(-1.0, 1.0), direction="more important", null=0.0, spaces=JOINT,
    ),
    "mean_joint_change": Metric(
        ml.joint_changes, "model", MODEL,
        "change of joint features when the block adds its mean (1 − cosine)", "Wang et al. 2023",
        bounds=(0.0, 2.0), direction="more important", null=0.0, spaces=JOINT,
    ),
    "contribution": Metric(
        ml.contribution_shares, "model", MODEL, "share of the joint embedding that the block adds",
        "Gandelsman et al. 2024", bounds=(-INF, INF), direction="more of the embedding", null=0.0,
        spaces=JOINT,
    ),
    "gradient_alignment": Metric(
        ml.gradient_alignment, "model", MODEL,
        "cosine of gradients of inner-base and inner-novel loss", "Yu et al. 2020",
        bounds=(-1.0, 1.0), direction="more alike", null="shuffle", smallest_n=4, spaces=JOINT,
    ),
    "relative_gradient_norm": Metric(
        ml.relative_gradient_norm, "model", MODEL,
        "gradient norm / weight norm of the block", "Lee et al. 2023",
        bounds=(0.0, INF), direction="more to change", null="shuffle", smallest_n=4, spaces=JOINT,
    ),
    "zero_shot_margin": Metric(
        ml.zero_shot_margins, "model", MODEL, "zero-shot margin (cosine, right less nearest wrong)",
        "Radford et al. 2021", bounds=(-2.0, 2.0), direction="nearer to the pretraining",
        null="shuffle", spaces=JOINT, towers=("vision",),
    ),
    # Attention
    "attention_entropy": Metric(
        at.attention_entropy, "attention", "heads",
        "attention entropy of a head (share of uniform)", "Vig and Belinkov 2019",
        direction="wider attention", null=1.0, invariances=("row order",),
        spaces=("attention_entropy",),
    ),
    "attention_distance": Metric(
        at.attention_distance, "attention", "heads",
        "attention distance of a head (share of uniform)", "Dosovitskiy et al. 2021",
        bounds=(0.0, INF), direction="farther attention", null=1.0, invariances=("row order",),
        spaces=("attention_distance",),
    ),
}
# fmt: on


def _variants(name: str, metric: Metric) -> dict[str, Metric]:
    """Return what the permutation null makes of an agreement: calibrated, and the largest pair."""
    label = metric.axis_label
    calibrated = replace(
        metric,
        function=ag.calibrated,
        needs="pair matrix",
        null=0.0,
        base=name,
        bounds=(-INF, 1.0),
        axis_label=f"{label}, calibrated",
        direction="more alike",
        invariances=(),
        sensitive="",
        parts=(),
        takes=(),
        settings={},
    )
    largest = replace(calibrated, axis_label=f"{label}, closest pair, calibrated as a maximum")
    return {f"{name}_calibrated": calibrated, f"{name}_max": largest}


for _name, _metric in [(n, m) for n, m in METRICS.items() if m.needs == "pairs"]:
    METRICS |= _variants(_name, _metric)
SHIPPED = frozenset(METRICS)  # a notebook adds its own to METRICS


@checked
def metric(name: str, where: str = "") -> Metric:
    """Return the entry of a metric: of the table, or of an installed package that offers it.

    Args:
        name: Its name. That of a package's metric is the name of its entry point in the group
            `vlmlayers.metrics`, which may name a function or a `Metric`.
        where: Where the name came from, such as a file; for the message.

    Raises:
        UserError: No metric has this name; the nearest one is named. Or what a package offers
            cannot serve as a metric.
    """
    # A package cannot replace a shipped metric: its name would then stand for other numbers.
    if name in METRICS:
        return declared(METRICS[name], f"METRICS[{name!r}]")  # a user may have put it there
    offered = packaged(GROUP)
    check_one_of("metric", name, [*METRICS, *offered], where)
    return packaged_metric(offered[name])


def find_metric(name: str) -> Metric | None:
    """Return the entry of a metric; None for one whose name is known to a score table alone."""
    try:
        return metric(name)
    except UserError:
        return None


@checked
def table(names: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the table for people: one row per metric, no functions.

    Args:
        names: Metrics to describe; None for all, those of installed packages last.

    Raises:
        UserError: As `metric`.
    """
    import pandas as pd

    every = dict.fromkeys([*METRICS, *packaged(GROUP)]) if names is None else names
    entries = {name: metric(name) for name in every}
    rows = [
        {
            "metric": name,
            "level": m.level,
            "meaning": m.summary,
            "needs": NEEDS[m.needs],
            "towers": ", ".join(m.towers),
            "spaces": ", ".join(m.spaces),
            "larger means": m.direction,
            "bounds": " … ".join(f"{b:.4g}".replace("inf", "∞") for b in m.bounds),
            "chance": m.null_text,
            "invariant to": ", ".join(m.invariances),
            "sensitive to": m.sensitive.replace("columns", "a scale of each column"),
            "smallest n": m.smallest_n,
            "axis label": m.axis_label,
            "reference": m.reference,
        }
        for name, m in entries.items()
    ]
    return pd.DataFrame(rows)
