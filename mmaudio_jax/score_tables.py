"""A report of score.py as Markdown and LaTeX, beside the published rows (published_results.json)."""
from collections.abc import Mapping
import functools
import json
import pathlib
from typing import Any

from mmaudio_jax import score_metrics

_RESULTS = pathlib.Path(__file__).with_name('published_results.json')
_LATEX = str.maketrans({letter: '\\' + letter for letter in '&%$#_{}'} | {
    '^': r'\textasciicircum{}', '~': r'\textasciitilde{}', '\\': r'\textbackslash{}'})
_SPREAD = 2.0  # how many times the difference of the one known rerun still counts as the same


@functools.cache
def _tables() -> dict[str, Any]:
    return json.loads(_RESULTS.read_text(encoding='utf-8'))


def published(table: str) -> dict[str, Any]:
    """Rows and rerun of a published table; {} for ''.

    Raises:
      ValueError: no such table.
    """
    if not table:
        return {}
    if table == 'about' or table not in _tables():
        raise ValueError(f'{_RESULTS.name} has no table {table!r}')
    return _tables()[table]


def all_rows(table: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """The published rows: MMAudio's, then those of the systems that it is compared with."""
    return {**table.get('rows', {}), **table.get('others', {})}


def spread(table: Mapping[str, Any], metric: str) -> float | None:
    """By how much two runs of the same system may differ: twice what the published rerun did; None when unknown."""
    rerun = table.get('rerun', {})
    if metric not in rerun.get('scores', {}):
        return None
    return _SPREAD * abs(rerun['scores'][metric] - table['rows'][rerun['of']][metric])


def title(metric: str) -> str:
    """Of the metric's column, with the arrow to the better."""
    return f'{score_metrics.METRICS[metric].title} {"↓" if score_metrics.METRICS[metric].lower else "↑"}'


def markdown(report: Mapping[str, Any]) -> str:
    """The table of all systems, the best of each column bold, then differences, published rows and everything to know."""
    names = report['metrics']
    lines = [f'| system | {" | ".join(map(title, names))} |', '|---' * (len(names) + 1) + '|']
    best = {name: _best(report, name) for name in names}
    for system, row in report['systems'].items():
        cells = []
        for name in names:
            cell = _interval(row['scores'].get(name, {}), name)
            cells.append(f'**{cell}**' if best[name] == system else cell)
        lines.append(f'| {_cell(system)} | {" | ".join(cells)} |')
    for pair, scores in report['differences'].items():
        lines.append(f'| {_cell(pair)} | {" | ".join(_interval(scores.get(name, {}), name) for name in names)} |')
    table = report['published']
    for row_name, scores in all_rows(table).items():
        lines.append(f'| *{row_name}, published* | {" | ".join(_number(scores.get(name), name) for name in names)} |')
        for system, row in report['systems'].items():
            own = row_name in table['rows']  # how far reruns of other systems differ is not known
            cells = [_against(row['scores'].get(name, {}), scores.get(name), spread(table, name) if own else None, name)
                     for name in names]
            lines.append(f'| {_cell(system)} − {row_name} | {" | ".join(cells)} |')
    return '\n'.join([*lines, '', *_notes(report)])


def latex(report: Mapping[str, Any]) -> str:
    """One row a system for a table in a paper, the best of each column bold; a comment says what the columns are."""
    names = report['metrics']
    lines = ['% system & ' + ' & '.join(score_metrics.METRICS[name].title for name in names) + r' \\']
    best = {name: _best(report, name) for name in names}
    for system, row in report['systems'].items():
        cells = []
        for name in names:
            cell = _number(row['scores'].get(name, {}).get('value'), name).replace('–', '--')
            cells.append(rf'\textbf{{{cell}}}' if best[name] == system else cell)
        lines.append(f'{system.translate(_LATEX)} & {" & ".join(cells)} \\\\')
    return '\n'.join(lines)


def _cell(name: str) -> str:
    """A name in a Markdown table."""
    return name.replace('|', r'\|')


def _best(report: Mapping[str, Any], name: str) -> str | None:
    """The best system of a column, when there are several and their figures cover the same clips."""
    scores = {system: row['scores'].get(name, {}) for system, row in report['systems'].items()}
    scores = {system: score for system, score in scores.items() if 'value' in score}
    if len(scores) < 2 or len({score['covered'] for score in scores.values()}) > 1:
        return None
    choose = min if score_metrics.METRICS[name].lower else max
    return choose(scores, key=lambda system: scores[system]['value'])


def _number(value: float | None, name: str) -> str:
    return '–' if value is None else f'{value:.{score_metrics.METRICS[name].digits}f}'


def _interval(score: Mapping[str, Any], name: str) -> str:
    if 'value' not in score:
        return '–'
    return f'{_number(score["value"], name)} [{_number(score["low"], name)}, {_number(score["high"], name)}]'


def _against(score: Mapping[str, Any], value: float | None, allowed: float | None, name: str) -> str:
    """The difference from a published figure, and whether it is within the spread of reruns."""
    if value is None or 'value' not in score:
        return '–'
    difference = score['value'] - value
    verdict = '' if allowed is None else ' (within reruns)' if abs(difference) <= allowed else ' (beyond reruns)'
    return f'{difference:+.{score_metrics.METRICS[name].digits}f}{verdict}'


def _notes(report: Mapping[str, Any]) -> list[str]:
    """Counts and what every figure's reader must know."""
    lines = [f'Protocol {report["protocol"]}, {report["duration_s"]:g} s of each clip, {report["asked"]} clips asked for. In '
             f'brackets: {report["interval"]:.0%} bootstrap intervals over clips.']
    if report['record_features'] and 'desync' in report['metrics']:
        lines.append('DeSync: the picture features are those of the records, rounded.')
    if report['lacking']:
        name, reason = next(iter(sorted(report['lacking'].items())))
        lines.append(f'**The references do not cover what was asked for**: {len(report["lacking"])} clips ({name}: {reason}).')
    short = {'the references': report['short'], **{system: row['short'] for system, row in report['systems'].items()}}
    for whose, clips in short.items():
        if clips:
            name, seconds = min(clips.items(), key=lambda item: item[1])
            lines.append(f'**{whose}: {len(clips)} sounds last less than {report["duration_s"]:g} s** ({name}: {seconds:g} s), '
                         'and count as they are.')
    for system, row in report['systems'].items():
        parts = [f'{len(row[key])} {key}' for key in ('missing', 'extra', 'failed') if row[key]]
        if parts:
            lines.append(f'**{system} does not cover what was asked for**: {", ".join(parts)}; {row["paired"]} of '
                         f'{report["asked"]} clips pair.')
        for name, score in row['scores'].items():
            column = score_metrics.METRICS[name].title
            if 'undefined' in score:
                lines.append(f'{system}, {column}: not defined: {score["undefined"]}')
                continue
            if score['clips'] != report['asked']:
                lines.append(f'{system}, {column}: over {score["clips"]} of {report["asked"]} clips.')
            if score['note']:
                lines.append(f'{system}, {column}: {score["note"]}.')
    for pair, scores in report['differences'].items():
        for name, score in scores.items():
            if 'undefined' in score:
                lines.append(f'{pair}, {score_metrics.METRICS[name].title}: not defined: {score["undefined"]}.')
    of = {'clips': (report['asked'], 'clips'), 'duration_s': (report['duration_s'], 's')}
    other = [f'{report["published"][key]:g} {unit} (here {here:g})' for key, (here, unit) in of.items()
             if report['published'].get(key, here) != here]
    if other:
        lines.append(f'**The published figures are of {", ".join(other)}**: the differences mix that in.')
    if 'rerun' in report['published']:
        lines.append(f'"Within reruns": no further from the published figure than {_SPREAD:g} times what the one known rerun '
                     f'of {report["published"]["rerun"]["of"]} was.')
    return [f'{line}  ' for line in lines]
