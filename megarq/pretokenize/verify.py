"""Whether a folder of code shards is fit to train on: every shard read once, and what the whole looks like.

    report = verify(Path("codes"), tokenizer=TextTokenizer.load("tokenizer.json"), length=64, workers=8)
    print(report.text()); report.passed()

A FAILED check means damage: missing or changed bytes, codes out of range, counts or an RQ-VAE that differ. A warning
means data that can be trained on but may not be what was wanted: repeated keys or pictures, a collapsed codebook, draws
that add nothing, captions that are cut.

Memory: 16 bytes of hashes for each sample and 32 more while repeats are sought, 1.5 GB at 30 million samples.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megarq.data.batches import batches_in_order
from megarq.data.code_shards import CodeShards
from megarq.data.manifest import CodeSettings, Manifest
from megarq.data.order import IntArray, UInt64Array
from megarq.errors import CheckpointError, DataError
from megarq.inference.pretrained import load_rqvae
from megarq.pretokenize.pictures import names, places, reconstruction
from megarq.pretokenize.shard_check import EXAMPLES, HASH_BYTES, Part, ShardCheck, ShardFindings
from megarq.rqvae.model import RQVAE, fingerprint
from megarq.text.tokenizer import TextTokenizer

LOW_USAGE = 0.1
"""A codebook of which a smaller share is used has collapsed."""
SAME_DRAWS = 0.99
"""Draws that agree more with the argmin codes add nothing to them."""
NOISY_DRAWS = 0.5
"""Draws among more than this share of the codebook are noise."""
MUCH = 0.05
"""Share of captions cut, or of samples skipped, bare or repeated, from which it is worth a warning."""
SAME_PICTURES, OTHER_PICTURES = 0.9, 0.5
"""Share of first-depth codes that must come out again without a warning, and at all."""
TOKENIZED_SAMPLES = 1_000_000
"""Samples whose captions are tokenized at most."""
EXACT_REPEATS = 10_000
"""Repeats that are compared byte by byte. Of 40,000 sets of 30 million samples, one has any collision of hashes."""


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "FAILED"


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    result: str
    """What was found."""
    where: list[str] = field(default_factory=list)
    """The first places that are concerned."""


@dataclass
class Report:
    """All checks of a folder, and the numbers behind them."""

    folder: str
    checks: list[Check] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers by name; lists have one entry for each depth."""

    def add(self, name: str, status: Status, result: str, where: Iterable[str] = ()) -> None:
        """Add a line."""
        self.checks.append(Check(name, status, result, list(where)))

    def passed(self, strict: bool = False) -> bool:
        """Whether to train on the folder; `strict` takes no warnings either."""
        wrong = {Status.FAILED, Status.WARNING} if strict else {Status.FAILED}
        return not any(check.status in wrong for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Everything, for json.dumps."""
        return {"folder": self.folder, "fit_to_train_on": self.passed(), "checks": [asdict(c) for c in self.checks]} | {
            "facts": self.facts
        }

    def text(self) -> str:
        """The table of checks, then the codebook depth by depth."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{check.name:<{width}}  {check.status:<7}  {check.result}")
            lines.extend(f"{'':<{width + 11}}{place}" for place in check.where)
        per_depth = {name: values for name, values in self.facts.items() if values and name.endswith("per depth")}
        if per_depth:
            name_width = max(map(len, per_depth))
            lines.append("")
            lines.extend(
                f"{name:<{name_width}}" + "".join(f"{value:>10.4g}" for value in values)
                for name, values in per_depth.items()
            )
        return "\n".join(lines)


def verify(
    folder: Path,
    *,
    rqvae: RQVAE | None = None,
    tokenizer: TextTokenizer | None = None,
    length: int | None = None,
    workers: int = 0,
    progress: bool = True,
) -> tuple[Report, CodeShards | None]:
    """Check a folder of code shards.

    Args:
        folder: output of pretokenize.
        rqvae: the one that the codes should be of, besides the one that lies in the folder.
        tokenizer: counts the tokens of captions, which training cuts at `length`.
        workers: processes that read shards; 0: this one.
        progress: whether to show a bar.

    Returns:
        The report, and a view of the shards without damage, None where no sample is in one.
    """
    report = Report(str(folder))
    try:
        manifest = Manifest.load(folder)
    except DataError as error:
        report.add("manifest", Status.FAILED, str(error))
        return report, None
    report.add("manifest", Status.OK, f"{manifest.samples} samples in {len(manifest.shards)} shards")
    _check_fingerprints(report, folder, manifest.settings, rqvae)
    every = max(1, manifest.samples // TOKENIZED_SAMPLES)
    total, undamaged = ShardFindings.empty("", manifest.settings), list[int]()
    bar = tqdm(total=manifest.samples, unit="sample", unit_scale=True, desc="verify", disable=not progress)
    with bar:
        check = ShardCheck(folder, manifest, tokenizer, every)
        shards = len(manifest.shards)
        for number, found in enumerate(batches_in_order(check, min(workers, shards), stop=shards)):
            bar.update(manifest.shards[number].samples)
            total.add(found)
            undamaged += [] if found.faults else [number]
    _report_parts(report, folder, manifest, total)
    report.facts |= {"samples": manifest.samples, "damaged shards": shards - len(undamaged)}
    _report_faults(report, manifest)
    whole = CodeShards(folder, manifest, undamaged)
    if not whole.samples:
        return report, None
    _report_codebook(report, manifest, total)
    _report_repeats(report, whole, total)
    _report_captions(report, total, length)
    return report, whole


def _check_fingerprints(report: Report, folder: Path, settings: CodeSettings, rqvae: RQVAE | None) -> None:
    """Whether the RQ-VAE in the folder, and the given one, wrote these codes."""
    try:
        stored = load_rqvae(folder)
    except CheckpointError as error:
        report.add("stored RQ-VAE", Status.FAILED, str(error))
    else:
        _check_rqvae(report, "stored RQ-VAE", stored, settings)
    if rqvae is not None:
        _check_rqvae(report, "given model", rqvae, settings)


def _check_rqvae(report: Report, name: str, rqvae: RQVAE, settings: CodeSettings) -> None:
    found, config = fingerprint(rqvae), rqvae.config
    ours = (settings.code_shape, settings.codebook_sizes)
    if found != settings.fingerprint:
        report.add(name, Status.FAILED, f"fingerprint {found[:12]}, the codes are of {settings.fingerprint[:12]}")
    elif (tuple(config.code_shape), tuple(config.sizes)) != ours:
        shapes = f"{tuple(config.code_shape)} of {tuple(config.sizes)}"
        report.add(name, Status.FAILED, f"codes {shapes}, the manifest says {ours[0]} of {ours[1]}")
    else:
        report.add(name, Status.OK, f"fingerprint {found[:12]}")


def _report_parts(report: Report, folder: Path, manifest: Manifest, total: ShardFindings) -> None:
    for part in Part:
        count, examples = total.faults[part], total.examples.get(part, [])
        if count:
            report.add(part, Status.FAILED, f"{count} found", _first(examples, count))
        else:
            report.add(part, Status.OK, f"{len(manifest.shards)} shards")
    listed = {shard.file for shard in manifest.shards}
    strays = sorted(path.name for pattern in ("*.tar", ".*.tmp") for path in folder.glob(pattern))
    strays = [name for name in strays if name not in listed]
    if strays:
        report.add("other files", Status.WARNING, f"{len(strays)} tars or half-written files not in the manifest")


def _report_codebook(report: Report, manifest: Manifest, total: ShardFindings) -> None:
    settings = manifest.settings
    used, perplexity = _usage(total.argmin, settings.codebook_sizes)
    facts = {"codes used, argmin, per depth": used, "codebook perplexity, argmin, per depth": perplexity}
    worst = int(np.argmin(used))
    collapsed = used[worst] < LOW_USAGE
    report.add(
        "codebook",
        Status.WARNING if collapsed else Status.OK,
        f"{used[worst]:.1%} of the codes that could occur do at depth {worst + 1}, the least used"
        + (": collapsed, train the RQ-VAE longer or with restart_unused_codes" if collapsed else ""),
    )
    if settings.draws:
        used, perplexity = _usage(total.drawn, settings.codebook_sizes)
        facts |= {"codes used, drawn, per depth": used, "codebook perplexity, drawn, per depth": perplexity}
        agreement = (total.agreeing / np.maximum(total.drawn.sum(1), 1)).tolist()
        facts |= {"draws equal to argmin, per depth": agreement}
        facts |= {"perplexity of Q, per depth": list(manifest.perplexity)}
        advice = _draws_advice(agreement, manifest)
        status = Status.WARNING if advice else Status.OK
        result = f"{agreement[0]:.1%} of drawn codes equal the argmin at depth 1, {agreement[-1]:.1%} at the last"
        report.add("draws", status, result + advice)
    report.facts |= facts


def _draws_advice(agreement: Sequence[float], manifest: Manifest) -> str:
    shares = [q / size for q, size in zip(manifest.perplexity, manifest.settings.codebook_sizes, strict=False)]
    if min(agreement) > SAME_DRAWS:
        return ": they add nothing, pretokenize with a higher --temperature"
    if shares and max(shares) > NOISY_DRAWS:
        return f": a draw chooses among {max(shares):.0%} of the codebook, pretokenize with a lower --temperature"
    return ""


def _usage(counts: IntArray, sizes: Sequence[int]) -> tuple[list[float], list[float]]:
    """[D, K] counts -> per depth: share of the codes that could occur that do, and exp(entropy) of their frequency."""
    shares, perplexities = [], []
    for row, size in zip(counts, sizes, strict=True):
        total = int(row.sum())
        frequency = row[row > 0] / max(total, 1)
        shares.append(len(frequency) / max(min(size, total), 1))
        perplexities.append(float(np.exp(-(frequency * np.log(frequency)).sum())))
    return shares, perplexities


def _report_repeats(report: Report, shards: CodeShards, total: ShardFindings) -> None:
    """Keys and argmin stacks that stand more than once."""

    def key(sample: int) -> str:
        return names(shards, [sample])[0].partition("/")[2]

    def stack(sample: int) -> bytes:
        return shards.read_codes(*places(shards, [sample])).tobytes()

    kinds: list[tuple[str, str, bytearray, Callable[[int], object]]] = [
        ("keys", "have the key of an earlier one", total.keys, key),
        ("pictures", "have the argmin codes of an earlier one", total.stacks, stack),
    ]
    for name, what, hashes, content in kinds:
        values = np.frombuffer(hashes, np.uint64)
        count, pairs = _repeats(values, content)
        report.facts[f"repeated {name}"] = count
        if not count:
            report.add(f"repeated {name}", Status.OK, "none")
            continue
        within = sum(len(set(map(shards.file_of, places(shards, pair)[0]))) == 1 for pair in pairs)
        result = f"{count} of {len(values)} samples {what} ({within} of the first {len(pairs)} in the same shard)"
        examples = [" and ".join(names(shards, pair)) for pair in pairs[:EXAMPLES]]
        report.add(f"repeated {name}", Status.WARNING, result, _first(examples, count))


def _repeats(values: UInt64Array, content: Callable[[int], object]) -> tuple[int, list[tuple[int, int]]]:
    """[n] hashes -> how many samples repeat an earlier one, and pairs (earlier, repeat) of the first of them.

    `content` gives what was hashed: the first EXACT_REPEATS pairs are compared, and no collision among them is counted.
    """
    order = np.argsort(values, kind="stable")
    later = np.flatnonzero(values[order[1:]] == values[order[:-1]]) + 1
    count = len(later)
    found = np.stack([order[later - 1], order[later]], 1)
    pairs = []
    for first, second in found[np.argsort(found[:, 1])][:EXACT_REPEATS].tolist():
        if content(first) == content(second):
            pairs.append((first, second))
        else:
            count -= 1
    return count, pairs


def _report_captions(report: Report, total: ShardFindings, length: int | None) -> None:
    samples, characters = len(total.keys) // HASH_BYTES, _Lengths(total.characters)
    bare = samples - total.captioned
    report.facts |= {"uncaptioned": bare, "captions": characters.count, "caption characters": characters.summary()}
    if not characters.count:
        report.add("captions", Status.OK, "none: for a model of classes or without condition")
        return
    status = Status.WARNING if bare > MUCH * samples else Status.OK
    result = f"{characters.count}, {characters} characters; {bare} of {samples} samples have none"
    report.add("captions", status, result, _first(total.uncaptioned, bare))
    if length is not None and total.tokens:
        tokens = _Lengths(total.tokens)
        cut = tokens.above(length) / tokens.count
        report.facts |= {"caption tokens": tokens.summary(), "length": length, "captions cut": cut}
        status = Status.WARNING if cut > MUCH else Status.OK
        counted = "" if tokens.count == characters.count else f" ({tokens.count} captions tokenized)"
        report.add("truncation", status, f"{cut:.2%} of captions are cut at {length}; {tokens} tokens{counted}")


class _Lengths:
    """Lengths with how often they occur."""

    def __init__(self, counts: Counter[int]) -> None:
        self._lengths = np.array(sorted(counts), np.int64)
        self._counts = np.array([counts[length] for length in sorted(counts)], np.int64)
        self.count = int(self._counts.sum())

    def above(self, length: int) -> int:
        return int(self._counts[self._lengths > length].sum())

    def summary(self) -> dict[str, float]:
        """Mean, median, 99th percentile and largest; nothing where there are none."""
        if not self.count:
            return {}
        ends = np.cumsum(self._counts)
        median, most = (int(self._lengths[np.searchsorted(ends, share * self.count)]) for share in (0.5, 0.99))
        mean = float((self._lengths * self._counts).sum() / self.count)
        return {"mean": mean, "median": median, "p99": most, "max": int(self._lengths[-1])}

    def __str__(self) -> str:
        return "{mean:.1f} on average, median {median}, 99% up to {p99}, longest {max}".format(**self.summary())


def _report_faults(report: Report, manifest: Manifest) -> None:
    """What pre-tokenization met and wrote down."""
    skipped = sum(shard.skipped for shard in manifest.shards)
    share = skipped / max(manifest.samples + skipped, 1)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(manifest.faults.items())) or "no faults"
    status = Status.WARNING if share > MUCH else Status.OK
    report.facts |= {"skipped at pre-tokenization": skipped, "faults at pre-tokenization": manifest.faults}
    report.add("pre-tokenization", status, f"{skipped} pictures skipped ({share:.2%}); {kinds}")


def _first(places: Sequence[str], count: int) -> list[str]:
    """The places to print of `count`."""
    shown = list(places[:EXAMPLES])
    return shown + [f"and {count - len(shown)} more"] * (count > len(shown))


def report_reconstruction(
    report: Report, shards: CodeShards, rqvae: RQVAE, sources: Mapping[str, str], count: int, seed: int = 0
) -> None:
    """Add how near the decoded codes are to their pictures, and whether encoding those again gives the same codes.

    sources: image shards by name. Raises: DataError where none of them is a source of the codes.
    """
    found = reconstruction(shards, rqvae, sources, count, seed)
    if found.missing:
        where = _first(found.missing, len(found.missing))
        report.add("originals", Status.FAILED, f"{len(found.missing)} samples not in their image shards", where)
    if not found.pictures:
        return
    report.facts |= {"reconstructed": found.pictures, "mse": found.mse, "psnr": found.psnr}
    report.facts |= {"same codes when encoded again, per depth": found.agreement}
    result = f"PSNR {found.psnr:.2f} dB, MSE {found.mse:.4g} in [-1, 1], over {found.pictures} pictures"
    report.add("reconstruction", Status.OK, result)
    first = found.agreement[0]
    status = Status.FAILED if first < OTHER_PICTURES else Status.WARNING if first < SAME_PICTURES else Status.OK
    result = f"{first:.2%} of the first-depth codes come out again in {shards.settings.precision}"
    report.add("encoding again", status, result + (": other pictures or transform" if status is not Status.OK else ""))
