"""What METEOR and the splitting of Chinese need from outside: stems and synonyms (nltk), and words (jieba)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache

from mm_moslora.utils.errors import MissingRequirementError
from mm_moslora.utils.package_requirements import install_extra, is_installed

_CHINESE = re.compile(r"[\u4e00-\u9fa5]")


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """The functions that comparisons of texts take."""

    stem: Callable[[str], str]
    synonyms: Callable[[str], Collection[str]]
    chinese: Callable[[str], Sequence[str]]
    """The words of a Chinese text."""

    def words(self, *texts: str) -> list[Sequence[str]]:
        """The words of texts: parted by space, or all as Chinese if one has a Chinese character."""
        cut = self.chinese if any(map(_CHINESE.search, texts)) else str.split
        return [cut(text) for text in texts]


@cache
def lexicon() -> Lexicon:
    """The installed one."""
    missing = [name for name in ("nltk", "jieba") if not is_installed(name)]
    if missing:
        raise MissingRequirementError(f"METEOR needs {' and '.join(missing)}: {install_extra('ocr')}.")
    from nltk.corpus import wordnet
    from nltk.stem.porter import PorterStemmer

    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise MissingRequirementError(
            "METEOR needs WordNet 3.0 where nltk finds it: python -m nltk.downloader wordnet, or a folder "
            "corpora/wordnet below one that NLTK_DATA names."
        ) from error

    @cache
    def synonyms(word: str) -> frozenset[str]:
        names = (name for meaning in wordnet.synsets(word) for name in meaning.lemma_names())
        return frozenset(name for name in names if "_" not in name)

    return Lexicon(stem=cache(PorterStemmer().stem), synonyms=synonyms, chinese=_chinese_splitter())


def _chinese_splitter() -> Callable[[str], Sequence[str]]:
    import logging

    import jieba

    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()

    @cache
    def ready() -> None:
        # By default it loads code-like data from a file of a fixed name in a folder that all users can write.
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.tmp_dir = folder
            tokenizer.initialize()

    def words(text: str) -> Sequence[str]:
        ready()
        return tokenizer.lcut(text)  # type: ignore[no-any-return]

    return words
