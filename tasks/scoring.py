"""Answer a file of histories with a served model's bundle."""

import hashlib
import time
from pathlib import Path
from typing import Annotated

from flytekit import FlyteContextManager, task
from flytekit.types.file import FlyteFile

from components.artifacts import Bundle
from components.recommenders.batch_scoring import ScoreConfig, score_file
from components.recommenders.serving import BundleRanker
from components.training.loop import device_of
from tasks import runtime
from tasks.flyte_types import by_content
from tasks.home import home
from tasks.tracking import StageRun, tracked


@task(**runtime.GPU)
def score_histories(
    bundle: Annotated[Bundle, by_content], histories: FlyteFile, config: ScoreConfig, run_id: str = ""
) -> FlyteFile:
    """Rank items for every history of a parquet file. Not cached: the result is a file that may be moved away.

    Args:
        bundle: Folder of a Bundle.
        histories: Parquet with a column history, lists of item ids, oldest first; other columns are kept.
        config: What to answer, a YAML file or JSON: k, exclude_seen, decode, rows.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked("score_histories", config, run_id, [bundle]) as run:
        source = Path(histories.download())
        record_file(run, source, str(histories.remote_source or source), "histories")
        target = home() / "scores" / f"{source.stem}-{run.run_id[:8]}.parquet"
        began = time.monotonic()
        scored = score_file(
            BundleRanker(bundle, device_of("auto")), source, target, config, lambda line: run.say(line)
        )
        seconds = time.monotonic() - began
        run.metrics(
            {
                "rows": scored.rows,
                "rows_per_second": scored.rows / seconds,
                "unknown_share": scored.ignored / max(1, scored.entries),
                "popular_share": scored.popular / max(1, scored.rows),
            }
        )
        record_file(run, target, str(target), "answers")
        run.say(f"{scored.rows:,} rows, {scored.rows / seconds:,.0f} a second: {target}")
        # Flyte copies files that stages return; on one machine the place just named is where it stays.
        files = FlyteContextManager.current_context().file_access
        return FlyteFile(str(target), remote_path=None if files.is_remote(files.raw_output_prefix) else False)


def record_file(run: StageRun, path: Path, source: str, context: str) -> None:
    """Record a file among the data sets of a run, by its sha256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    run.dataset(path.name, digest, source, context)
