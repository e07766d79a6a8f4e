# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Where training text comes from: packages of Debian and of PyPI.

Only licences that allow weights trained on the text to be shared under Apache-2.0
without a doubt: public domain and permissive ones. What is fetched is hashed into the
manifest; Debian serves one version at a time, PyPI's are pinned here.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

KINDS = ("prose", "code")


@dataclass(frozen=True)
class Source:
    """A package and which of its files are read.

    Attributes:
        requirement: as its client names it.
        licence: of the files read.
        client: "apt" or "pip".
        kind: "prose" or "code".
        files: patterns (``fnmatch``) of paths in the package.
        held_out: patterns of paths, or of titles, that are never trained on.
    """

    requirement: str
    licence: str
    client: str
    kind: str
    files: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.requirement.partition("==")[0]


def _apt(package: str, licence: str, *files: str, held_out=()) -> Source:
    return Source(package, licence, "apt", "prose", files, tuple(held_out))


def _pip(requirement: str, licence: str, held_out: bool = False) -> Source:
    held = ("*",) if held_out else ()
    return Source(requirement, licence, "pip", "code", ("*.py",), held)


PROSE = (
    _apt(
        "r-cran-janeaustenr",
        "public domain",
        "*/data/Rdata.rdb",
        held_out=["*Persuasion*"],
    ),
    _apt(
        "golang-github-andybalholm-brotli-dev",
        "public domain",
        "*Opticks.txt",
        held_out=["*"],
    ),
    _apt("jargon-text", "public domain", "*/jargon.txt.gz"),
    # Its language reference is the text of pydoc's topics, which benchmarks use.
    _apt(
        "python3.11-doc",
        "PSF-2.0",
        "*/_sources/*.txt",
        held_out=["*/_sources/reference/*"],
    ),
    _apt("postgresql-doc-15", "PostgreSQL", "*/html/*.html"),
    _apt("sqlite3-doc", "public domain", "*.html"),
    _apt("apache2-doc", "Apache-2.0", "*/manual/en/*.html"),
    _apt("python-django-doc", "BSD-3-Clause", "*/html/[f-u]*/*.html"),
    _apt("python-sqlalchemy-doc", "MIT", "*.rst"),
    _apt(
        "rust-doc",
        "MIT OR Apache-2.0",
        *(
            f"*/html/{book}/*.html"
            for book in ("book", "reference", "rust-by-example", "nomicon", "rustc")
        ),
    ),
    _apt("perl-doc", "Artistic-1.0-Perl OR GPL-1.0-or-later", "*.pod"),
    _apt("ada-reference-manual-2012", "ARM licence", "*/aarm2012.txt/*.TXT"),
    _apt("llvm-14-doc", "Apache-2.0 WITH LLVM-exception", "*.html"),
    _apt("clang-14-doc", "Apache-2.0 WITH LLVM-exception", "*.html"),
    _apt("erlang-doc", "Apache-2.0", "*.html"),
    _apt("nodejs-doc", "MIT", "*.html"),
    _apt("racket-doc", "MIT OR Apache-2.0", "*.html"),
)

CODE = (
    _pip("networkx==3.6.1", "BSD-3-Clause", held_out=True),
    _pip("werkzeug==3.1.9", "BSD-3-Clause", held_out=True),
    _pip("pypdf==7.1.1", "BSD-3-Clause", held_out=True),
    _pip("celery==5.7.0", "BSD-3-Clause", held_out=True),
    _pip("transformers==5.24.0", "Apache-2.0"),
    _pip("sympy==1.14.0", "BSD-3-Clause"),
    _pip("twisted==26.10.0", "MIT"),
    _pip("keras==3.15.1", "Apache-2.0"),
    _pip("wagtail==8.0.1", "BSD-3-Clause"),
    _pip("xarray==2026.9.0", "Apache-2.0"),
    _pip("dask==2026.8.0", "BSD-3-Clause"),
    _pip("django==5.2.19", "BSD-3-Clause"),
    _pip("nltk==3.10.4", "Apache-2.0"),
    # Holds copies of rich, urllib3 and requests.
    _pip("pip==26.3", "MIT"),
    _pip("pygments==2.21.0", "BSD-2-Clause"),
    _pip("torch-geometric==2.8.1", "MIT"),
    _pip("huggingface-hub==2.4.0", "Apache-2.0"),
    _pip("sphinx==9.0.4", "BSD-2-Clause"),
    _pip("reportlab==5.1.0", "BSD-3-Clause"),
    _pip("peft==0.21.2", "Apache-2.0"),
    _pip("textual==8.2.8", "MIT"),
    _pip("bokeh==3.9.2", "BSD-3-Clause"),
    _pip("setuptools==84.2.1", "MIT"),
    _pip("langchain-core==1.8.4", "MIT"),
    _pip("distributed==2026.8.0", "BSD-3-Clause"),
    _pip("datasets==5.2.0", "Apache-2.0"),
    _pip("ipython==9.18.1", "BSD-3-Clause"),
    _pip("pydantic==2.14.4", "MIT"),
    _pip("trio==0.35.0", "MIT OR Apache-2.0"),
    _pip("accelerate==1.15.0", "Apache-2.0"),
    _pip("botocore==1.44.8", "Apache-2.0"),
    _pip("pytest==9.2.0", "MIT"),
    _pip("prompt-toolkit==3.0.53", "BSD-3-Clause"),
    _pip("scrapy==2.19.0", "BSD-3-Clause"),
    _pip("seaborn==0.13.2", "BSD-3-Clause"),
    _pip("poetry==2.5.1", "MIT"),
    _pip("tox==4.67.15", "MIT"),
    _pip("fastapi==0.165.0", "MIT"),
    _pip("openpyxl==3.1.5", "MIT"),
    _pip("jedi==0.20.1", "MIT"),
    _pip("jinja2==3.1.6", "BSD-3-Clause"),
    _pip("click==8.5.1", "BSD-3-Clause"),
    _pip("flask==3.1.3", "BSD-3-Clause"),
)
SOURCES = PROSE + CODE

# benchmarks/accuracy evaluates on these: whatever shares text with them is dropped.
EVALUATED_MODULES = ("argparse", "ast", "zipfile", "tarfile", "inspect", "typing")


def evaluated_texts() -> dict[str, str]:
    """Name and text of what benchmarks use: pydoc's topics, library modules."""
    from pydoc_data.topics import topics

    modules = [import_module(name).__file__ for name in EVALUATED_MODULES]
    paths = [Path(file) for file in modules if file]
    texts = {path.name: path.read_text("utf-8") for path in paths}
    return {"pydoc_data.topics": "\n\n".join(topics.values()), **texts}
