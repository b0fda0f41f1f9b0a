"""The section of report.html on calibrated rounding: errors of layers' outputs. Returns escaped HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bagel_compress.parity.report_data import LayerRounding, number
from bagel_compress.report.svg import line_chart


def rounding_section(layers: Sequence[LayerRounding]) -> str:
    """The error of each layer's outputs, that of nearest rounding, and the predicted ratio; empty without layers."""
    if not layers:
        return ""
    charts = []
    for expert in dict.fromkeys(layer.expert for layer in layers):
        own = [layer for layer in layers if layer.expert == expert]
        lines = {
            "calibrated": [(float(layer.layer), layer.error) for layer in own],
            "each weight rounded alone": [(float(layer.layer), layer.nearest) for layer in own],
            "predicted": [(float(layer.layer), layer.nearest * layer.predictor) for layer in own],
        }
        charts.append(line_chart(f"{expert} expert", "layer", lines))
    rows = "".join(
        f"<tr><td>layer {layer.layer} {escape(layer.expert)}</td>"
        f"<td class='n' data-is='error'>{number(layer.error)}</td>"
        f"<td class='n' data-is='rounded alone'>{number(layer.nearest)}</td>"
        f"<td class='n' data-is='ratio'>{layer.ratio:.2f}</td>"
        f"<td class='n' data-is='predicted'>{layer.predictor:.2f}</td></tr>"
        for layer in layers
    )
    head = "".join(f"<th class='n'>{h}</th>" for h in ("error", "rounded alone", "ratio", "predicted ratio"))
    return (
        "<h2>Calibrated rounding</h2><p class='soft'>Relative error of the layers' outputs over the inputs of the"
        " calibration set. The signal-to-noise ratio of the weights is no measure here: calibrated rounding makes"
        " larger errors in weights, in directions that the inputs do not have."
        " The predicted ratio, sqrt(tr D / tr H), follows from the second moments of the inputs alone.</p>"
        f"<div class='charts'>{''.join(charts)}</div><details><summary>all {len(layers)} layers and experts</summary>"
        f"<div class='scroll'><table class='rows'><tr><th>weights</th>{head}</tr>{rows}</table></div></details>"
    )
