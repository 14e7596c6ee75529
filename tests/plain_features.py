"""The feature pipeline in its plain form: floats, one-hot tensors, the whole chain four times, one step after another.

It follows the data specification literally and shares only the residue tables with ``scalefold.data``, so that the
fast pipeline can be compared with it on any chain. Slow on purpose.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F

from scalefold.data import residues

PI2 = 2.0 / np.pi


def generator(seed):
    return torch.Generator().manual_seed(seed % 2**64)


def plain_features(chain, settings, seed, training):
    """All features of one chain without batch dimension, every key with a trailing dimension of all slices."""
    shared = chain_features(chain, settings, seed, training)
    slices = []
    for e in range(settings.num_recycling_iters + 1):
        features = dict(shared)
        features.update(alignment_features(chain, settings, seed + e))
        features = crop(features, settings, seed, training)
        slices.append(pad(features, settings, training))
    out = {key: torch.stack([s[key] for s in slices], dim=-1) for key in slices[0]}
    if training:
        clamped = 1.0 if random.Random(seed).uniform(0, 1) < settings.use_clamped_fape_probability else 0.0
        out["use_clamped_fape"] = torch.full((len(slices),), clamped)
    return out


# --- steps that do not depend on the slice ----------------------------------------------------------------------------


def chain_features(chain, settings, seed, training):
    aatype = torch.from_numpy(chain.aatype.astype(np.int64))
    positions = torch.from_numpy(chain.all_atom_positions)
    mask = torch.from_numpy(chain.all_atom_mask.astype(np.float32))
    length = len(aatype)
    features = {
        "aatype": aatype,
        "residue_index": torch.arange(length),
        "seq_length": torch.tensor(length),
        "seq_mask": torch.ones(length),
        "target_feat": torch.cat([torch.zeros(length, 1), F.one_hot(aatype, 21).float()], dim=-1),
        "all_atom_positions": positions,
        "all_atom_mask": mask,
        "resolution": torch.tensor(chain.resolution, dtype=torch.float32),
        "is_distillation": torch.tensor(0.0),
    }
    features["pseudo_beta"], features["pseudo_beta_mask"] = pseudo_beta(aatype, positions, mask)
    features.update(atom14(aatype, positions, mask))
    features.update(rigid_groups(aatype, positions, mask))
    torsion, _, torsion_mask = torsions(aatype, positions, mask)
    features["chi_angles_sin_cos"], features["chi_mask"] = torsion[:, 3:], torsion_mask[:, 3:]
    features.update(template_features(chain, settings, seed, training))
    return features


def template_features(chain, settings, seed, training):
    hits = list(chain.templates)
    if training:
        head = hits[: settings.shuffle_top_k_prefiltered]
        random.Random(seed).shuffle(head)
        hits = head + hits[settings.shuffle_top_k_prefiltered :]
    hits = [hit for hit in hits if hit.ok][: settings.max_template_hits]
    length, count = len(chain.aatype), len(hits)
    aatype, positions = torch.zeros(count, length, dtype=torch.int64), torch.zeros(count, length, 37, 3)
    mask, sum_probs = torch.zeros(count, length, 37), torch.zeros(count, 1)
    for i, hit in enumerate(hits):
        aatype[i] = torch.from_numpy(residues.HHBLITS_TO_RESTYPE[hit.aatype])
        positions[i], mask[i] = torch.from_numpy(hit.all_atom_positions), torch.from_numpy(hit.all_atom_mask).float()
        sum_probs[i] = hit.sum_probs
    beta, beta_mask = pseudo_beta(aatype, positions, mask)
    angles = [torsions(aatype[i], positions[i], mask[i]) for i in range(count)]
    empty = [torch.zeros(0, length, 7, 2), torch.zeros(0, length, 7, 2), torch.zeros(0, length, 7)]
    torsion, alternative, torsion_mask = [torch.stack(part) for part in zip(*angles, strict=True)] or empty
    return {
        "template_aatype": aatype,
        "template_all_atom_positions": positions,
        "template_all_atom_mask": mask,
        "template_sum_probs": sum_probs,
        "template_mask": torch.ones(count),
        "template_pseudo_beta": beta,
        "template_pseudo_beta_mask": beta_mask,
        "template_torsion_angles_sin_cos": torsion,
        "template_alt_torsion_angles_sin_cos": alternative,
        "template_torsion_angles_mask": torsion_mask,
    }


def pseudo_beta(aatype, positions, mask):
    is_gly = (aatype == residues.RESTYPES.index("G"))[..., None]
    ca, cb = residues.CA_ATOM37, residues.CB_ATOM37
    point = torch.where(is_gly, positions[..., ca, :], positions[..., cb, :])
    return point, torch.where(is_gly[..., 0], mask[..., ca], mask[..., cb])


def atom14(aatype, positions, mask):
    """Residue by residue, slot by slot, by atom name."""
    length = len(aatype)
    out = {
        "residx_atom14_to_atom37": torch.zeros(length, 14, dtype=torch.int64),
        "residx_atom37_to_atom14": torch.zeros(length, 37, dtype=torch.int64),
        "atom14_atom_exists": torch.zeros(length, 14),
        "atom37_atom_exists": torch.zeros(length, 37),
        "atom14_gt_exists": torch.zeros(length, 14),
        "atom14_gt_positions": torch.zeros(length, 14, 3),
        "atom14_alt_gt_exists": torch.zeros(length, 14),
        "atom14_alt_gt_positions": torch.zeros(length, 14, 3),
        "atom14_atom_is_ambiguous": torch.zeros(length, 14),
    }
    for i, restype in enumerate(aatype.tolist()):
        name = residues.RESNAMES[restype]
        atoms = residues.ATOM14_NAMES[name]
        swaps = residues.ATOM_RENAMING_SWAPS.get(name, {})
        partner = {**swaps, **{b: a for a, b in swaps.items()}}
        for slot, atom in enumerate(atoms):
            if not atom:
                continue
            slot37 = residues.ATOM37_INDEX[atom]
            other37 = residues.ATOM37_INDEX[partner.get(atom, atom)]
            out["residx_atom14_to_atom37"][i, slot] = slot37
            out["residx_atom37_to_atom14"][i, slot37] = slot
            out["atom14_atom_exists"][i, slot] = out["atom37_atom_exists"][i, slot37] = 1.0
            out["atom14_gt_exists"][i, slot] = mask[i, slot37]
            out["atom14_gt_positions"][i, slot] = positions[i, slot37] * mask[i, slot37]
            out["atom14_alt_gt_exists"][i, slot] = mask[i, other37]
            out["atom14_alt_gt_positions"][i, slot] = positions[i, other37] * mask[i, other37]
            out["atom14_atom_is_ambiguous"][i, slot] = float(atom in partner)
    return out


def frame(negative_x, origin, xy_plane):
    """Three points [3] -> rotation [3, 3] with columns x, y, z (numpy)."""
    eps = np.float32(1e-8)
    x = origin - negative_x
    x = x / np.sqrt((x**2).sum() + eps)
    y = xy_plane - origin
    y = y - (y * x).sum() * x
    y = y / np.sqrt((y**2).sum() + eps)
    return np.stack([x, y, np.cross(x, y)], axis=-1)


def rigid_groups(aatype, positions, mask):
    length, positions, mask = len(aatype), positions.numpy(), mask.numpy()
    frames, alternative = np.zeros((2, length, 8, 4, 4), dtype=np.float32)
    gt_exists, exists, ambiguous = np.zeros((3, length, 8), dtype=np.float32)
    for i, restype in enumerate(aatype.tolist()):
        name = residues.RESNAMES[restype]
        chis = residues.CHI_ANGLE_ATOMS.get(name, [])
        groups = {0: ["C", "CA", "N"], 3: ["CA", "C", "O"], **{4 + k: atoms[1:] for k, atoms in enumerate(chis)}}
        for group in range(8):
            slots = [residues.ATOM37_INDEX[atom] for atom in groups.get(group, ["N", "N", "N"])]
            rotation = frame(*positions[i, slots])
            rotation = rotation @ np.diag(np.float32([-1, 1, -1])) if group == 0 else rotation
            is_last_chi = name in residues.ATOM_RENAMING_SWAPS and group == 3 + len(chis)
            flip = np.diag(np.float32([1, -1, -1])) if is_last_chi else np.eye(3, dtype=np.float32)
            for target, rot in ((frames, rotation), (alternative, rotation @ flip)):
                target[i, group, :3, :3], target[i, group, :3, 3] = rot, positions[i, slots[1]]
                target[i, group, 3, 3] = 1.0
            exists[i, group] = float(group in groups)
            gt_exists[i, group] = mask[i, slots].min() * exists[i, group]
            ambiguous[i, group] = float(is_last_chi)
    features = {
        "rigidgroups_gt_frames": frames,
        "rigidgroups_alt_gt_frames": alternative,
        "rigidgroups_gt_exists": gt_exists,
        "rigidgroups_group_exists": exists,
        "rigidgroups_group_is_ambiguous": ambiguous,
        "backbone_rigid_tensor": frames[:, 0],
        "backbone_rigid_mask": gt_exists[:, 0],
    }
    return {key: torch.from_numpy(value) for key, value in features.items()}


def torsions(aatype, positions, mask):
    length, index, positions, mask = len(aatype), residues.ATOM37_INDEX, positions.numpy(), mask.numpy()
    angles, alternative = np.zeros((2, length, 7, 2), dtype=np.float32)
    exists = np.zeros((length, 7), dtype=np.float32)
    for i, restype in enumerate(aatype.clamp(max=20).tolist()):
        chis = residues.CHI_ANGLE_ATOMS.get(residues.RESNAMES[restype], [])
        atoms = [
            [(-1, "CA"), (-1, "C"), (0, "N"), (0, "CA")],
            [(-1, "C"), (0, "N"), (0, "CA"), (0, "C")],
            [(0, "N"), (0, "CA"), (0, "C"), (0, "O")],
            *([(0, atom) for atom in chi] for chi in chis),
            *([(0, "N")] * 4 for _ in range(4 - len(chis))),
        ]
        for k, quad in enumerate(atoms):
            present = [i + step >= 0 for step, _ in quad]
            points = [
                positions[i + step, index[atom]] if here else np.zeros(3, np.float32)
                for (step, atom), here in zip(quad, present, strict=True)
            ]
            masks = [
                mask[i + step, index[atom]] if here else np.float32(0)
                for (step, atom), here in zip(quad, present, strict=True)
            ]
            rotation = frame(points[1], points[2], points[0])
            local = rotation.T @ points[3] - rotation.T @ points[2]
            pair = local[[2, 1]] / np.sqrt(local[2] ** 2 + local[1] ** 2 + np.float32(1e-8))
            pair = -pair if k == 2 else pair
            periodic = k >= 3 and bool(residues.CHI_PI_PERIODIC[restype, k - 3])
            angles[i, k], alternative[i, k] = pair, -pair if periodic else pair
            exists[i, k] = np.prod(masks) * float(k < 3 + len(chis))
    return torch.from_numpy(angles), torch.from_numpy(alternative), torch.from_numpy(exists)


# --- steps of one slice -----------------------------------------------------------------------------------------------


def alignment_features(chain, settings, seed):
    msa = torch.from_numpy(residues.HHBLITS_TO_RESTYPE[chain.msa])
    deletions = torch.from_numpy(chain.deletion_matrix.astype(np.float32))
    profile = F.one_hot(msa, 22).float().mean(dim=0)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(len(msa) - 1, generator=generator(seed)) + 1])
    chosen, rest = order[: settings.max_msa_clusters], order[settings.max_msa_clusters :]
    true_msa, masked, was_masked = mask_msa(msa[chosen], profile, settings, seed)
    cluster_profile, cluster_deletions = summarise(masked, deletions[chosen], msa[rest], deletions[rest])
    kept = rest[torch.randperm(len(rest), generator=generator(seed))[: settings.max_extra_msa]]
    deletion = deletions[chosen]
    parts = [
        F.one_hot(masked, 23).float(),
        deletion.clamp(0, 1)[..., None],
        (PI2 * torch.atan(deletion / 3.0))[..., None],
        cluster_profile,
        (PI2 * torch.atan(cluster_deletions / 3.0))[..., None],
    ]
    length = msa.shape[1]
    return {
        "msa_feat": torch.cat(parts, dim=-1),
        "true_msa": true_msa,
        "bert_mask": was_masked.float(),
        "msa_mask": torch.ones(len(chosen), length),
        "msa_row_mask": torch.ones(len(chosen)),
        "extra_msa": msa[kept],
        "extra_msa_mask": torch.ones(len(kept), length),
        "extra_msa_row_mask": torch.ones(len(kept)),
        "extra_has_deletion": deletions[kept].clamp(0, 1),
        "extra_deletion_value": PI2 * torch.atan(deletions[kept] / 3.0),
    }


def mask_msa(msa, profile, settings, seed):
    s = settings
    uniform = torch.tensor([0.05] * 20 + [0.0, 0.0])
    known = s.masked_msa_uniform_prob * uniform + s.masked_msa_profile_prob * profile
    known = known + s.masked_msa_same_prob * F.one_hot(msa, 22)
    rest = 1.0 - s.masked_msa_profile_prob - s.masked_msa_same_prob - s.masked_msa_uniform_prob
    probabilities = F.pad(known, (0, 1), value=rest)
    stream = generator(seed)
    was_masked = torch.rand(msa.shape, generator=stream) < s.masked_msa_replace_fraction
    replacement = torch.multinomial(probabilities.reshape(-1, 23) + 1e-10, 1, generator=stream).reshape(msa.shape)
    return msa, torch.where(was_masked, replacement, msa), was_masked


def summarise(masked, deletions, extra, extra_deletions):
    """One-hot agreement, nearest centre, and the averages over each cluster with its centre."""
    weight = torch.cat([torch.ones(21), torch.zeros(2)])
    extra_one_hot, centre_one_hot = F.one_hot(extra, 23).float(), F.one_hot(masked, 23).float()
    agreement = (extra_one_hot * weight).flatten(1) @ centre_one_hot.flatten(1).T
    cluster = agreement.argmax(dim=1)
    sums = centre_one_hot.index_add(0, cluster, extra_one_hot)
    deletion_sums = deletions.index_add(0, cluster, extra_deletions)
    counts = torch.ones_like(deletions).index_add(0, cluster, torch.ones_like(extra_deletions))
    denominator = 1e-6 + counts
    return sums / denominator[..., None], deletion_sums / denominator


# --- crop and padding -------------------------------------------------------------------------------------------------

NUM_RES = "residues"
AXES = {
    "seq_length": [], "resolution": [], "is_distillation": [],
    "msa_row_mask": ["msa"], "extra_msa_row_mask": ["extra"],
    "template_mask": ["templates"], "template_sum_probs": ["templates"],
}  # fmt: skip


def axes_of(key):
    if key in AXES:
        return AXES[key]
    if key.startswith("template_"):
        return ["templates", NUM_RES]
    if key in ("msa_feat", "true_msa", "bert_mask", "msa_mask"):
        return ["msa", NUM_RES]
    return ["extra", NUM_RES] if key.startswith("extra_") else [NUM_RES]


def crop(features, settings, seed, training):
    length, count = len(features["aatype"]), len(features["template_mask"])
    stream, size, start = generator(seed), length, 0
    order = list(range(count))[: settings.max_templates]
    if training:
        size = min(length, settings.train_sequence_crop_size)
        if count:
            first = int(torch.randint(0, count + 1, (1,), generator=stream))
            order = torch.randperm(count, generator=stream).tolist()
            order = order[first : first + min(count - first, settings.max_templates)]
        start = int(torch.randint(0, length - size + 1, (1,), generator=stream))
    out = {}
    for key, value in features.items():
        axes = axes_of(key)
        if "templates" in axes:
            value = value[order]
        if NUM_RES in axes:
            value = value.narrow(axes.index(NUM_RES), start, size)
        out[key] = value
    out["seq_length"] = torch.tensor(size)
    return out


def pad(features, settings, training):
    length = settings.train_sequence_crop_size if training else len(features["aatype"])
    sizes = {
        NUM_RES: length,
        "msa": settings.max_msa_clusters,
        "extra": settings.max_extra_msa,
        "templates": settings.max_templates,
    }
    out = {}
    for key, value in features.items():
        shape = list(value.shape)
        for axis, name in enumerate(axes_of(key)):
            shape[axis] = sizes[name]
        padded = torch.zeros(shape, dtype=value.dtype)
        padded[tuple(slice(0, n) for n in value.shape)] = value
        out[key] = padded
    return out
