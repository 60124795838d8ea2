"""The items of the paper from the command line.

    python -m staa.items train table4 preset=cut seeds=3    # every run of the grid into runs/, what is there is kept
    python -m staa.items vouch table4 preset=cut seeds=3    # its finished records into data/records
    python -m staa.items ship NAME                          # runs/NAME: its record and its network into data
"""

from pathlib import Path

from . import records, weights
from .command import command, words_to_settings
from .config import Config
from .experiments import ITEMS, PARAMETERS, Settings, run_all, settings
from .records import Record, RecordError
from .settings import ConfigError, one_of

#: Bytes that a shipped network may have: it is committed.
SHIPPED = 10_000_000


def parameters(words: list[str]) -> Settings:
    """name=value, ... as a notebook's parameters; raises ConfigError on a name that no notebook has."""
    given = words_to_settings(words)
    for name in sorted(given.keys() - PARAMETERS):
        one_of("a parameter", name, sorted(PARAMETERS))
    return settings({"preset": "smoke", "seeds": 1} | given)


def vouch(configs: list[Config]) -> tuple[list[Config], list[Config]]:
    """Copy the finished records of these runs to data/records: (copied or there before, without a record). Raises
    RecordError where data/networks has the network of another training of one of them."""
    found = {config: records.find(config) for config in configs}
    places = {config: records.folder("records") / f"{config.name}.json" for config in configs}
    for config, record in found.items():
        there = Record.load(places[config]) if places[config].is_file() else None
        if record and weights.shipped_file(config).is_file() and (there is None or there.outcome != record.outcome):
            raise RecordError(f"data/networks holds the network of another training of {config}; `ship {config.name}` "
                              "puts this one with its record in its place.")
    for config, record in found.items():
        if record:
            record.save(places[config])
    return [c for c in configs if found[c]], [c for c in configs if not found[c]]


def ship(name: str) -> Path:
    """A finished run's network to data/networks and its record to data/records. Raises RecordError where there is no
    such run, its weights are damaged, or they are too large to be committed."""
    path = records.folder("runs") / name / "record.json"
    if not path.is_file():
        raise RecordError(f"there is no finished run {path.parent}.")
    record = Record.load(path)
    network = weights.trained(record)
    size = sum(t.nbytes for t in network.state_dict().values())
    if size > SHIPPED:
        raise RecordError(f"the network of {name} has {size / 1e6:.1f} MB; at most {SHIPPED / 1e6:.0f} MB are shipped.")
    shipped = weights.shipped_file(network.config)
    vouched = records.folder("records") / f"{network.config.name}.json"
    if vouched.is_file() and Record.load(vouched).outcome != record.outcome:
        vouched.unlink()  # another network's: not to stand beside this one if the next two lines are interrupted
    weights.save(shipped, network.state_dict(), network.config, record.outcome["classes"])
    record.save(vouched)
    return shipped


def usage() -> str:
    return f"{__doc__}\nItems: {', '.join(ITEMS)}\nParameters: {', '.join(sorted(PARAMETERS))}"


def main(words: list[str]) -> None:
    if len(words) == 2 and words[0] == "ship":
        print(f"{ship(words[1])} is written, and its record beside those in {records.folder('records')}.")
        return
    if len(words) < 2 or words[0] not in ("train", "vouch") or words[1] not in ITEMS:
        raise ConfigError(f"write train or vouch, then one of {', '.join(ITEMS)}, then name=value, ...; or ship "
                          f"and the name of a finished run; got {' '.join(words)!r}")
    configs = ITEMS[words[1]](parameters(words[2:]))
    if words[0] == "train":
        run_all(configs)
        return
    done, missing = vouch(configs)
    print(f"{len(done)} records of {words[1]} are in {records.folder('records')}.")
    for config in missing:
        print(f"{config} has no record yet: {config.name}")


if __name__ == "__main__":
    command(main, usage)
