"""The command rank: behaviours that vectors elicit on held-out prompts, scores of each vector, and groups of them."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Column, Table

from vectors.analysis.behaviours import Behaviour, Ranking, rank_behaviours
from vectors.analysis.clusters import Cluster, VectorScore, cluster_vectors, score_vectors
from vectors.analysis.figures import behaviour_bars
from vectors.commands.files import Loading, Model, beside, check_free, write_json
from vectors.prompts import Prompts, read_texts
from vectors.steering import SteeringVectors

Ranked = tuple[list[VectorScore], list[Cluster]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """Rank the behaviours that vectors bring about, and show what single vectors and groups of them do."""

    model: Model
    """folder in the Hugging Face layout, or a hub id; remote code is never run"""
    vectors: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="VECTORS ...", help_behavior_hint="(required)")
    ]
    """one or several safetensors files of vectors; their layers and norms may differ"""
    prompts: Path
    """clean prompts, best not learned on: text with one message per line, a table (.jsonl, .csv, ...), or a data set"""
    column: str | None = None
    """column that holds the prompts, where they are a table or a data set; guessed by its name where not given"""
    skip: int = 0
    """number of first prompts to leave out: as many as the vectors were learned on"""
    top: int = 10
    """number of rows per table, and of behaviours in the JSON file, at most"""
    threshold: float = 0.8
    """mean cosine, from -1 to 1, between the effects of two groups of vectors from which the groups are joined"""
    out: Path = Path("ranked.json")
    """JSON file to write all results to; a figure goes beside it"""
    batch_size: int = 1024
    """number of batch rows (vectors x prompts) at a time; fewer need less memory"""
    overwrite: bool = False
    """replace output files that exist"""
    loading: Annotated[Loading, tyro.conf.arg(name="")] = Loading()

    def __call__(self, console: Console) -> int:
        """Ranks, prints, writes; always 0."""
        if self.skip < 0 or self.top < 1 or self.batch_size < 1:
            raise ValueError(f"skip is {self.skip}, top {self.top}, batch_size {self.batch_size}; give 0, 1, 1 or more")
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; a cosine is between -1 and 1")
        if not self.vectors:
            raise ValueError("no file of vectors; give one or several")
        check_free([self.out], self.overwrite)
        texts = read_texts(self.prompts, self.skip + 2, self.column)[self.skip :]
        model, tokenizer = self.loading(self.model)
        pool = {path: SteeringVectors.load(path, model) for path in self.vectors}
        prompts = Prompts.from_chat(model, tokenizer, texts)
        if not self.skip:
            console.print("note: on all lines, those learned on too; --skip N leaves the first N out")
        # Rows of scores follow their vectors everywhere, and so tell where a behaviour's vector came from.
        marked = [
            replace(
                vectors, scores={"file": [float(number)] * len(vectors), "index": [*map(float, range(len(vectors)))]}
            )
            for number, vectors in enumerate(pool.values())
        ]
        size = self.batch_size
        with console.status("completing"):
            found = rank_behaviours(model, tokenizer, marked, prompts, Ranking(top=self.top, batch_size=size))
            parts: dict[Path, Ranked] = {
                path: (
                    score_vectors(model, tokenizer, vectors, prompts, batch_size=size),
                    cluster_vectors(
                        model, tokenizer, vectors, prompts, threshold=self.threshold, batch_size=min(size, 512)
                    ),
                )
                for path, vectors in pool.items()
            }
        behaviours = [self._row(behaviour) for behaviour in found]
        self._show(console, behaviours, parts)
        content = {
            "model": self.model,
            "adapter": self.loading.adapter,
            "prompts": len(prompts),
            "threshold": self.threshold,
            "behaviours": behaviours,
            "files": {
                str(path): {"scores": [asdict(s) for s in scores], "clusters": [asdict(c) for c in clusters]}
                for path, (scores, clusters) in parts.items()
            },
        }
        written = [write_json(self.out, content)]
        if found:
            stem, labels = beside(self.out, "-behaviours"), [behaviour.text for behaviour in found]
            written += behaviour_bars(labels, [b.score for b in found], stem, quantity="score (0 to 1)")
        for path in written:
            console.print(f"wrote {path}", soft_wrap=True)
        return 0

    def _row(self, behaviour: Behaviour) -> dict[str, Any]:
        """A behaviour without its vector, which is named by file and index."""
        origin = behaviour.vector.scores
        names = ("text", "token_ids", "score", "votes", "reach", "agreement", "surprise", "certainty")
        where = {"file": str(self.vectors[int(origin["file"][0])]), "index": int(origin["index"][0])}
        return {name: getattr(behaviour, name) for name in names} | where

    def _show(self, console: Console, behaviours: list[dict[str, Any]], parts: dict[Path, Ranked]) -> None:
        """Tables; texts as Python writes them, for what a model wrote may hold anything."""
        if behaviours:
            names = ("behaviour", "score", "votes", "reach", "surprise (nats)", "certainty")
            table = Table(*names, Column("best vector", overflow="fold"))
            for row in behaviours:
                numbers = f"{row['score']:.3f}", str(row["votes"]), f"{row['reach']:.0%}", f"{row['surprise']:.1f}"
                where = f"{Path(row['file']).name}:{row['index']}"
                table.add_row(repr(row["text"]), *numbers, f"{row['certainty']:.2f}", where)
            console.print(table)
        else:
            console.print("no behaviour that several vectors agree on; that is not a clean bill of health")
        for path, (scores, clusters) in parts.items():
            table = Table("vector", "generality", "coherence (nats)", "distance", "completion", title=path.name)
            # First what holds on most prompts and is far from the unsteered text; among equals the more fluent.
            for score in sorted(scores, key=lambda s: (-s.generality * s.distance, -s.coherence))[: self.top]:
                shares = f"{score.generality:.0%}", f"{score.coherence:.2f}", f"{score.distance:.0%}"
                table.add_row(str(score.index), *shares, repr(score.text))
            console.print(table)
            table = Table("vectors", "medoid", "completion", title=f"{path.name}: {len(clusters)} groups")
            for group in clusters[: self.top]:
                table.add_row(str(len(group.members)), str(group.medoid), repr(group.text))
            console.print(table)
