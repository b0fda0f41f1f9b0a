"""The verbs card, publish, verify and batch."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from bagel_compress.cli import add_json, add_verb, emit


def register(verbs: Any) -> None:
    """Adds this group's parsers to `verbs` (an argparse sub-parsers action)."""
    card = add_verb(
        verbs, "card", "print the model card that publish would write", "bagel-compress card out/nf4 me/repo"
    )
    _what(card)
    card.set_defaults(verb=_card)

    publish = add_verb(
        verbs, "publish", "check a build, write its model card, upload it, and verify the upload",
        "bagel-compress publish out/nf4 me/BAGEL-7B-MoT-NF4 --dry-run\n"
        "  bagel-compress publish out/nf4 me/BAGEL-7B-MoT-NF4 --collection 'BAGEL-7B-MoT builds'\n"
        "  bagel-compress publish out/nf4 me/BAGEL-7B-MoT-NF4 --draft --private",
    )  # fmt: skip
    _what(publish)
    publish.add_argument("--dry-run", action="store_true", help="write the release folder, show the differences, stop")
    publish.add_argument(
        "--unrun", action="store_true", help="also publish an export whose engines were never run; its card says so"
    )
    publish.add_argument("--private", action="store_true", help="make a new repository private")
    publish.add_argument("--revision", default="main", metavar="BRANCH", help="branch to publish to (default: main)")
    publish.add_argument("--create-pr", action="store_true", help="open a pull request instead of writing the branch")
    publish.add_argument(
        "--replace", action="store_true", help="replace another build in the repository; its files are deleted"
    )
    publish.add_argument(
        "--collection", default="", metavar="TITLE", help="add it to this collection of builds of its base"
    )
    publish.add_argument("--folder", type=Path, metavar="DIR", help="release folder (default: BUILD.release)")
    publish.add_argument(
        "--receipts", type=Path, default=Path("exports/receipts"), metavar="DIR", help="folder of receipts"
    )
    publish.add_argument("--sign", type=Path, metavar="KEY", help="sign with this EC private key (extra: sign)")
    add_json(publish)
    publish.set_defaults(verb=_publish)

    verify = add_verb(
        verbs, "verify", "verify that a folder or repository is byte for byte what was released; exit 1 if not",
        "bagel-compress verify out/nf4\n  bagel-compress verify me/BAGEL-7B-MoT-NF4 --full --key publisher.pem",
    )  # fmt: skip
    verify.add_argument("where", metavar="REPO|DIR", help="artifact, export or release, or owner/name[@revision]")
    verify.add_argument("--full", action="store_true", help="of a repository: download and read every byte")
    verify.add_argument("--key", type=Path, metavar="PEM", help="public key of the signature (implies --full)")
    add_json(verify)
    verify.set_defaults(verb=_verify)

    batch = add_verb(
        verbs, "batch", "build several recipes for several checkpoints; run it again to continue after an interruption",
        "bagel-compress batch builds.yaml\n  bagel-compress batch builds.yaml --jobs 2 --executor ray",
    )  # fmt: skip
    batch.add_argument("file", type=Path, metavar="FILE", help="YAML with out, sources and recipes")
    batch.add_argument("--jobs", type=int, default=1, metavar="N", help="builds at a time (default: 1)")
    batch.add_argument("--executor", choices=("local", "ray"), default="local", help="where jobs run (extra: ray)")
    add_json(batch)
    batch.set_defaults(verb=_batch)


def _what(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("build", type=Path, metavar="BUILD", help="folder that compress or export wrote")
    parser.add_argument("repo", metavar="REPO", help="owner/name on the Hub")
    parser.add_argument(
        "--draft", action="store_true", help="mark it as a draft, for a private repository or a PR only"
    )
    parser.add_argument("--base-model", metavar="ID", help="Hub id of the compressed model (default: the manifest's)")
    parser.add_argument("--license", default="apache-2.0", metavar="ID", help="licence of the weights on the Hub")


def _card(args: argparse.Namespace) -> int:
    from bagel_compress.publishing.card_sections import Origin
    from bagel_compress.publishing.export_card import card_of
    from bagel_compress.publishing.publishable import open_publishable, source_of
    from bagel_compress.publishing.release_reports import load_reports

    publishable = open_publishable(args.build)
    reports, faults = load_reports(publishable)
    origin = Origin.of(source_of(publishable), args.repo, args.base_model, args.license)
    print(card_of(publishable, reports, origin, draft=args.draft or bool(faults)), end="")
    return 0


def _publish(args: argparse.Namespace) -> int:
    from bagel_compress.publishing.pipeline import PublishRequest, prepare_release, preview, publish

    request = PublishRequest(
        build=args.build, repo=args.repo, base_model=args.base_model, license=args.license, folder=args.folder,
        receipts=args.receipts, revision=args.revision, private=args.private, draft=args.draft, unrun=args.unrun,
        create_pr=args.create_pr, replace=args.replace, signing_key=args.sign, collection=args.collection,
    )  # fmt: skip
    if args.dry_run:
        release = prepare_release(request)
        print(f"{release.folder}: {len(release.files)} files, as they would be uploaded", file=sys.stderr)
        text = preview(release, request.repo, request.revision)
        emit(args, {"folder": str(release.folder), "files": sorted(release.files), "preview": text}, text)
        return 0
    done = publish(request, _show)
    lines = [f"{done.uploaded.url}: {len(done.release.files)} files uploaded and verified"]
    lines += [f"pull request: {done.uploaded.pull_request}"] if done.uploaded.pull_request else []
    lines += ["the repository is private; its settings page makes it public"] if done.uploaded.private else []
    lines += [f"receipt: {path}" for path in done.receipts] + [f"card updated: {repo}" for repo in done.cards]
    data = {
        "repo": done.uploaded.repo, "commit": done.uploaded.commit, "url": done.uploaded.url,
        "pull_request": done.uploaded.pull_request, "private": done.uploaded.private,
        "artifact": done.release.publishable.digest,
        "receipts": [str(path) for path in done.receipts], "cards": list(done.cards),
    }  # fmt: skip
    emit(args, data, "\n".join(lines))
    return 0


def _show(name: str, sent: int, total: int) -> None:
    print(f"{sent / 1e9:8.3f} of {total / 1e9:.3f} GB  {name or 'all sent; committing'}", file=sys.stderr)


def _verify(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from bagel_compress.publishing.verify import verify_folder, verify_repo

    if Path(args.where).exists():
        verdict = verify_folder(Path(args.where), args.key)
    else:
        verdict = verify_repo(args.where, None, args.full, args.key)
    emit(args, asdict(verdict), verdict.text)
    return 1 if verdict.faults else 0


def _batch(args: argparse.Namespace) -> int:
    from bagel_compress.publishing.batch import BatchFile, line, run_batch, summary

    def show(result: Any) -> None:
        print(line(result), file=sys.stderr)

    cluster = os.environ.get("RAY_ADDRESS")
    results = run_batch(BatchFile.load(args.file), args.jobs, args.executor, cluster, show)
    emit(args, {"jobs": [r.to_json() for r in results]}, summary(results))
    return 0 if all(r.error is None for r in results) else 1
