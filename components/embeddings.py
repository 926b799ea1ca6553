"""Item text to content vectors: LSA fitted here, a sentence transformer, or vectors made elsewhere.

An encoder is fitted once, encodes shards of the catalogue independently, and the shards are put together.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
import safetensors.torch
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from components.artifacts import ContentEmbeddings, ContentEncoder, EmbeddingShard, ItemCatalog
from components.config import Config
from components.folders import ArtifactError, Provenance

VOCABULARY = ContentEncoder.SCHEMAS["vocabulary"]
TOKEN = r"(?u)\b\w+\b"
"""A run of letters and digits; single characters count, since titles hold sizes and numbers."""


class LsaConfig(Config):
    """Latent semantic analysis: TF-IDF, then a truncated SVD. Needs no weights and no network."""

    kind: Literal["lsa"] = "lsa"
    dim: int = Field(128, ge=2)
    """Width of the vectors; below the number of items and of terms."""
    ngram_max: int = Field(2, ge=1, le=3)
    """Longest phrase that counts as a term, in words."""
    min_df: int = Field(1, ge=1)
    """Items that must hold a term for it to count; raise it for catalogues beyond about 100,000 items."""
    seed: int = 0
    """Seeds the randomised SVD."""


class SentenceTransformerConfig(Config):
    """A pretrained sentence encoder; needs the extra sidflow[text]."""

    kind: Literal["sentence_transformer"] = "sentence_transformer"
    model: str
    """Name on the Hugging Face hub, or a local folder."""
    revision: str | None = None
    """Revision on the hub; null: the newest."""
    batch_size: int = Field(64, ge=1)
    """Texts a forward pass."""
    device: str = "cpu"
    """Where to run it, as torch names it."""
    sha256: str | None = None
    """Digest of the weights; found when the encoder is made, and checked whenever it encodes."""


class PrecomputedConfig(Config):
    """Vectors made elsewhere."""

    kind: Literal["precomputed"] = "precomputed"
    path: str
    """A .npy, .parquet or .safetensors file with one vector a row."""
    vectors: str = "vectors"
    """Column of the parquet file, or tensor of the safetensors file, that holds the vectors."""
    ids: str | None = None
    """Raw item ids of the rows: a column of the parquet file, or else a text file with one id a line.
    null: the rows are the items of the catalogue in its order."""
    rows: Literal["in_order", "by_id"] = "in_order"
    """in_order: ids, where given, must equal the catalogue's row by row. by_id: rows are looked up by their
    ids, so the file may hold more items, in any order."""
    sha256: str | None = None
    """Digest of the file; found when the encoder is made, and checked whenever it encodes."""


EncoderConfig = Annotated[
    LsaConfig | SentenceTransformerConfig | PrecomputedConfig, Field(discriminator="kind")
]


def fit_encoder(catalog: ItemCatalog, config: EncoderConfig) -> ContentEncoder:
    """Make the encoder of a catalogue: fit LSA, or pin the weights or the file that will be read.

    Parameters
    ----------
    catalog : ItemCatalog
        Its ``text`` is what the vectors will describe.
    config : EncoderConfig
        One kind of the union.

    Returns
    -------
    ContentEncoder
        Carries all that ``encode_shard`` needs; its ``config`` validates as an ``EncoderConfig``.

    Raises
    ------
    ValueError
        An item without usable text, or ``dim`` beyond what the texts hold (``lsa``).
    FileNotFoundError
        The file of ``precomputed`` is not there.
    ModuleNotFoundError
        The extra of ``sentence_transformer`` is not installed.
    ArtifactError
        A digest given in the configuration is not that of the weights or the file.
    """
    vocabulary = pl.DataFrame(schema=VOCABULARY)
    projection_VD = torch.zeros(0, 0)
    match config:
        case LsaConfig():
            vocabulary, projection_VD = _fit_lsa(catalog, config)
        case SentenceTransformerConfig():
            config = config.model_copy(update={"sha256": _digest_of_model(_open_model(config))})
        case PrecomputedConfig():
            config = config.model_copy(update={"sha256": _digest_of_file(config)})
    return ContentEncoder(
        vocabulary=vocabulary,
        weights={"projection": projection_VD},
        config=config.model_dump(mode="json"),
        catalog=catalog.fingerprint,
        provenance=Provenance(parents={"ItemCatalog": catalog.fingerprint}),
    )


def encode_shard(
    encoder: ContentEncoder, catalog: ItemCatalog, shard: int, num_shards: int
) -> EmbeddingShard:
    """Encode one of ``num_shards`` runs of consecutive items.

    Parameters
    ----------
    encoder : ContentEncoder
        From ``fit_encoder``, on this catalogue or an earlier one.
    catalog : ItemCatalog
        All items.
    shard, num_shards : int
        Which part, from 0, of how many; parts differ by at most one item.

    Returns
    -------
    EmbeddingShard
        For ``lsa`` and ``precomputed`` bit for bit what one single shard would hold in these rows. A sentence
        transformer pads its batches, so there rows may differ in the last bits.

    Raises
    ------
    ValueError
        More shards than items, or an item without usable text.
    """
    start, end = _bounds(catalog.num_items, shard, num_shards)
    rows = catalog.items.slice(start, end - start)
    config: EncoderConfig = TypeAdapter(EncoderConfig).validate_python(encoder.config)
    match config:
        case LsaConfig():
            x_ND = _encode_lsa(encoder, config, rows)
        case SentenceTransformerConfig():
            x_ND = _encode_sentences(config, rows)
        case PrecomputedConfig():
            x_ND = _read_vectors(config, catalog)[start:end]
    return EmbeddingShard(
        vectors={"vectors": x_ND.contiguous()},
        shard=shard,
        num_shards=num_shards,
        start=start,
        catalog=catalog.fingerprint,
        encoder=encoder.fingerprint,
    )


def unreadable(encoder: ContentEncoder, catalog: ItemCatalog) -> pl.Series:
    """Return the ids (u32) of the items that an encoder has no words for, ascending.

    Of an ``lsa`` those none of whose words it knows, as newcomers may be; of a ``sentence_transformer`` those without
    text. ``precomputed`` vectors are read by position or id: what they lack is a mistake, and stays an error.
    """
    config: EncoderConfig = TypeAdapter(EncoderConfig).validate_python(encoder.config)
    items = catalog.items
    match config:
        case LsaConfig():
            return items["item_id"].filter(_unread(_tfidf(encoder, config, items)))
        case SentenceTransformerConfig():
            return items["item_id"].filter(_blank(items))
        case PrecomputedConfig():
            return items["item_id"].clear()


def assemble(
    shards: list[EmbeddingShard], catalog: ItemCatalog, encoder: ContentEncoder
) -> ContentEmbeddings:
    """Put shards together, in whatever order they arrive.

    Raises
    ------
    ArtifactError
        A shard is missing, there twice, short, of another width, catalogue or encoder; or a vector is not
        finite. The message names the shard.
    """
    if not shards:
        raise ArtifactError("no shards to assemble: encode_shard makes them")
    ordered = sorted(shards, key=lambda part: part.shard)
    total, width = ordered[0].num_shards, ordered[0].matrix.shape[1]
    present = [part.shard for part in ordered]
    twice = sorted({number for number in present if present.count(number) > 1})
    missing = sorted(set(range(total)) - set(present))
    if twice or missing:
        raise ArtifactError(
            f"embedding shards of {total}: {missing} are missing, {twice} are there more than once"
        )
    for part in ordered:
        name = f"embedding shard {part.shard} of {part.num_shards}"
        start, end = _bounds(catalog.num_items, part.shard, total)
        if part.num_shards != total:
            raise ArtifactError(f"{name}: the others are parts of {total}")
        if part.catalog != catalog.fingerprint or part.encoder != encoder.fingerprint:
            raise ArtifactError(f"{name}: made from another catalogue or by another encoder; encode it again")
        if (part.start, len(part.matrix)) != (start, end - start):
            raise ArtifactError(
                f"{name}: holds {len(part.matrix)} rows from item {part.start}, "
                f"wants {end - start} from item {start}; encode it again"
            )
        if part.matrix.shape[1] != width:
            raise ArtifactError(f"{name}: {part.matrix.shape[1]} columns, the first shard has {width}")
    x_ND = torch.cat([part.matrix for part in ordered])
    norms_N = x_ND.norm(dim=1)
    return ContentEmbeddings(
        vectors={"vectors": x_ND},
        encoder=str(encoder.config["kind"]),
        revision=encoder.fingerprint,
        normalised=bool(torch.allclose(norms_N, torch.ones_like(norms_N), atol=1e-4)),
        catalog=catalog.fingerprint,
        provenance=Provenance(
            config=encoder.config,
            parents={"ItemCatalog": catalog.fingerprint, "ContentEncoder": encoder.fingerprint},
        ),
    )


def encode_items(catalog: ItemCatalog, config: EncoderConfig) -> ContentEmbeddings:
    """Fit an encoder and encode the whole catalogue in one piece."""
    encoder = fit_encoder(catalog, config)
    return assemble([encode_shard(encoder, catalog, 0, 1)], catalog, encoder)


def _bounds(num_items: int, shard: int, num_shards: int) -> tuple[int, int]:
    if not 0 <= shard < num_shards:
        raise ValueError(f"shard {shard} of {num_shards}: shards count from 0")
    if num_shards > num_items:
        raise ValueError(
            f"{num_shards} shards of {num_items} items: shard {shard} may be empty; ask for fewer shards"
        )
    return shard * num_items // num_shards, (shard + 1) * num_items // num_shards


def _vectorizer(config: LsaConfig, terms: list[str] | None) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        ngram_range=(1, config.ngram_max),
        token_pattern=TOKEN,
        sublinear_tf=True,
        min_df=config.min_df,
        vocabulary=terms,
    )


def _fit_lsa(catalog: ItemCatalog, config: LsaConfig) -> tuple[pl.DataFrame, Tensor]:
    """Return terms with their inverse document frequencies, and the projection (terms, dim)."""
    from sklearn.decomposition import TruncatedSVD

    vectorizer = _vectorizer(config, None)
    texts = catalog.items["text"].fill_null("").to_list()
    try:
        tfidf_NV = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise ValueError(
            f"lsa finds no term in the item texts ({error}); lower embedding.encoder.min_df"
        ) from error
    _check_text(tfidf_NV, catalog.items)
    if config.dim >= min(tfidf_NV.shape):
        raise ValueError(
            f"lsa: dim {config.dim} must be below the {tfidf_NV.shape[0]} items and the {tfidf_NV.shape[1]} "
            f"terms of their texts; set embedding.encoder.dim to at most {min(tfidf_NV.shape) - 1}"
        )
    # scikit-learn fixes the sign of every component, so equal seeds give equal vectors.
    svd = TruncatedSVD(config.dim, algorithm="randomized", random_state=config.seed).fit(tfidf_NV)
    vocabulary = pl.DataFrame(
        {"term": vectorizer.get_feature_names_out().tolist(), "idf": vectorizer.idf_}, schema=VOCABULARY
    )
    return vocabulary, torch.from_numpy(np.ascontiguousarray(svd.components_.T))


def _encode_lsa(encoder: ContentEncoder, config: LsaConfig, rows: pl.DataFrame) -> Tensor:
    """Project TF-IDF rows and bring them to length 1, in float64 until the end."""
    tfidf_NV = _tfidf(encoder, config, rows)
    _check_text(tfidf_NV, rows)
    x_ND = torch.from_numpy(tfidf_NV @ encoder.weights["projection"].numpy())
    return torch.nn.functional.normalize(x_ND, dim=1, eps=1e-12).float()


def _tfidf(encoder: ContentEncoder, config: LsaConfig, rows: pl.DataFrame) -> Any:
    """Return the TF-IDF rows of some items over the terms that the encoder knows, as a scipy CSR matrix."""
    vectorizer = _vectorizer(config, encoder.vocabulary["term"].to_list())
    vectorizer.idf_ = encoder.vocabulary["idf"].to_numpy()
    return vectorizer.transform(rows["text"].fill_null("").to_list())


def _unread(tfidf_NV: Any) -> pl.Series:
    """Say which rows have not a single known term."""
    return pl.Series(np.diff(tfidf_NV.indptr) == 0)


def _blank(rows: pl.DataFrame) -> pl.Series:
    """Say which items have no text."""
    return rows["text"].fill_null("").str.strip_chars() == ""


def _check_text(tfidf_NV: Any, rows: pl.DataFrame) -> None:
    """Refuse rows without a single known term: their vector would be zero."""
    without = rows.filter(_unread(tfidf_NV))
    if len(without):
        raise ValueError(
            f"lsa: {len(without)} items have no usable text, the first are raw ids "
            f"{without['raw_id'].head(5).to_list()} with text {without['text'].head(5).to_list()}; "
            "give them a title or drop them, lower embedding.encoder.min_df, or use precomputed vectors; of items that "
            "came after the encoder was fitted it may know no word: set them aside (set_aside), or fit it again in a "
            "full retraining"
        )


def _open_model(config: SentenceTransformerConfig) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sentence_transformer needs the extra sidflow[text] (pip install 'sidflow[text]'), or use lsa"
        ) from error
    return SentenceTransformer(config.model, revision=config.revision, device=config.device)


def _digest_of_model(model: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _encode_sentences(config: SentenceTransformerConfig, rows: pl.DataFrame) -> Tensor:
    without = rows.filter(_blank(rows))
    if len(without):
        raise ValueError(
            f"sentence_transformer: {len(without)} items have no text, the first are raw ids "
            f"{without['raw_id'].head(5).to_list()}; give them a title or drop them"
        )
    model = _open_model(config)
    _same_digest(config.sha256, _digest_of_model(model), config.model)
    x_ND = model.encode(
        rows["text"].to_list(),
        batch_size=config.batch_size,
        normalize_embeddings=True,
        show_progress_bar=False,
    )
    return torch.from_numpy(np.ascontiguousarray(x_ND, dtype=np.float32))


def _digest_of_file(config: PrecomputedConfig) -> str:
    path = Path(config.path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; embedding.encoder.path names the precomputed vectors")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _same_digest(config.sha256, digest, config.path)
    return digest


def _same_digest(wanted: str | None, found: str, name: str) -> None:
    if wanted is not None and wanted != found:
        raise ArtifactError(
            f"{name}: has sha256 {found[:12]}, the encoder was made with {wanted[:12]}; fit it again"
        )


def _read_vectors(config: PrecomputedConfig, catalog: ItemCatalog) -> Tensor:
    """Read the file and return its rows (n_items, dim) float32 in the catalogue's order."""
    _digest_of_file(config)
    path = Path(config.path)
    match path.suffix:
        case ".npy":
            x_ND = np.load(path, allow_pickle=False)
        case ".parquet":
            x_ND = _read_column(path, config.vectors)
        case ".safetensors":
            tensors = safetensors.torch.load_file(path)
            if config.vectors not in tensors:
                raise ValueError(
                    f"{path}: no tensor {config.vectors!r}, it holds {sorted(tensors)}; "
                    "set embedding.encoder.vectors"
                )
            x_ND = tensors[config.vectors].float().numpy()
        case other:
            raise ValueError(f"{path}: precomputed vectors are .npy, .parquet or .safetensors, got {other!r}")
    if x_ND.ndim != 2 or x_ND.dtype.kind not in "fiu":
        raise ValueError(
            f"{path}: wants numbers of shape (n_items, dim), got {x_ND.dtype} of shape {x_ND.shape}"
        )
    finite_N = np.isfinite(x_ND).all(axis=1)
    if not finite_N.all():
        raise ValueError(
            f"{path} row {int((~finite_N).argmax())}: a vector must be finite; "
            f"{int((~finite_N).sum())} are not"
        )
    order_N = _rows_of(config, path, catalog, len(x_ND))
    return torch.from_numpy(np.ascontiguousarray(x_ND[order_N], dtype=np.float32))


def _read_column(path: Path, column: str) -> np.ndarray[Any, Any]:
    frame = pl.read_parquet(path)
    if column not in frame.columns:
        raise ValueError(
            f"{path}: no column {column!r}, it holds {frame.columns}; set embedding.encoder.vectors"
        )
    widths = frame.select(pl.col(column).cast(pl.List(pl.Float32)).list.len()).to_series()
    odd = frame.with_row_index("row").filter(widths != widths[0])
    if len(odd):
        raise ValueError(f"{path} row {odd['row'][0]}: a vector of another length than row 0 ({widths[0]})")
    return frame[column].cast(pl.List(pl.Float32)).explode().to_numpy().reshape(len(frame), -1)


def _rows_of(config: PrecomputedConfig, path: Path, catalog: ItemCatalog, count: int) -> np.ndarray[Any, Any]:
    """Return the file's row of every item."""
    ids = _read_ids(config, path)
    if ids is not None and len(ids) != count:
        raise ValueError(f"{path}: {count} vectors, {len(ids)} ids in {config.ids!r}")
    if config.rows == "by_id":
        return _look_up(ids, path, catalog)
    if count != catalog.num_items:
        raise ValueError(
            f"{path}: {count} vectors for {catalog.num_items} items of the catalogue; k-core may have "
            "dropped items: write one row an item in the catalogue's order, or give ids and set "
            "embedding.encoder.rows=by_id"
        )
    if ids is not None:
        differs = (ids != catalog.items["raw_id"]).arg_true()
        if len(differs):
            row = int(differs[0])
            raise ValueError(
                f"{path} row {row}: holds item {ids[row]!r}, the catalogue has "
                f"{catalog.items['raw_id'][row]!r} there ({len(differs)} rows differ); sort the file by the "
                "catalogue, or set embedding.encoder.rows=by_id"
            )
    return np.arange(count)


def _read_ids(config: PrecomputedConfig, path: Path) -> pl.Series | None:
    if config.ids is None:
        return None
    if path.suffix == ".parquet":
        columns = pl.read_parquet_schema(path)
        if config.ids not in columns:
            raise ValueError(
                f"{path}: no column {config.ids!r}, it holds {list(columns)}; set embedding.encoder.ids"
            )
        return pl.read_parquet(path, columns=[config.ids])[config.ids].cast(pl.String)
    listing = Path(config.ids)
    if not listing.is_file():
        raise FileNotFoundError(
            f"{listing}: no such file; embedding.encoder.ids names a text file with one raw id a line"
        )
    return pl.Series(listing.read_text().splitlines(), dtype=pl.String)


def _look_up(ids: pl.Series | None, path: Path, catalog: ItemCatalog) -> np.ndarray[Any, Any]:
    if ids is None:
        raise ValueError("embedding.encoder.rows=by_id looks rows up by raw id: set embedding.encoder.ids")
    known = pl.DataFrame({"raw_id": ids}, schema={"raw_id": pl.String}).with_row_index("row")
    twice = known.filter(pl.col("raw_id").is_duplicated())
    if len(twice):
        raise ValueError(f"{path} row {twice['row'][0]}: id {twice['raw_id'][0]!r} is there more than once")
    found = catalog.items.select("raw_id").join(known, on="raw_id", how="left", maintain_order="left")
    missing = found.filter(pl.col("row").is_null())["raw_id"]
    if len(missing):
        raise ValueError(
            f"{path}: no vector for {len(missing)} items, the first are {missing.head(5).to_list()}"
        )
    return found["row"].to_numpy()
