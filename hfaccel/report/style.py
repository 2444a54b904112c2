"""The style sheet of ``report.html``: Okabe and Ito's colours, light and dark, from 390 pixels upwards."""

STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f6f7f9;--line:#d5d9df;--ink:#16191d;--soft:#59616c;--blue:#0072b2;--pale:#bcdcf0;
--orange:#c24e00;--over:#fdf0e6;--green:#007a5a;--grey:#8a929d;--note:#fff6dc;--note-line:#e0b93c}
@media(prefers-color-scheme:dark){:root{--page:#14171b;--card:#1e2329;--line:#39414b;--ink:#e9ecf0;--soft:#a3adb9;--blue:#56b4e9;
--pale:#274a60;--orange:#f58a3c;--over:#2b211a;--green:#3fc79a;--grey:#8a929d;--note:#322b16;--note-line:#8f7628}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif}
main{max-width:1288px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:44px 0 8px;padding-top:12px;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:24px 0 4px}
p{margin:6px 0 10px;max-width:76ch}
.what,.soft,caption,.legend{color:var(--soft);font-size:.875rem}
.headline{font-size:1.2rem;line-height:1.45;margin:14px 0 18px;max-width:66ch}
.note{background:var(--note);border-left:4px solid var(--note-line);padding:9px 14px;margin:8px 0;max-width:none}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px;margin:18px 0}
.tile{background:var(--card);border-radius:8px;padding:12px 16px}
.tile b{display:block;font-size:1.6rem;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums}
.tile span{display:block;font-size:.875rem;color:var(--soft)}
.scroll{overflow-x:auto;margin:10px 0 16px;border:1px solid var(--line);border-radius:8px}
.scroll:focus-visible{outline:2px solid var(--blue)}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:8px 12px}
th,td{text-align:left;padding:6px 10px;border-top:1px solid var(--line);vertical-align:top}
thead th{white-space:nowrap;font-weight:600;color:var(--soft);background:var(--card);border-top:0}
tbody th{font-weight:600;min-width:120px}
tr.shipped th,tr.shipped td{background:var(--card)}
.nowrap{white-space:nowrap}
.wide{display:block;min-width:210px}.line{display:block;font-size:.8rem}
.badge{display:inline-block;white-space:nowrap}
.badge.shipped{color:var(--blue);font-weight:650}.badge.refused{color:var(--orange)}.badge.not-built{color:var(--soft)}
.shaky{color:var(--orange);white-space:nowrap}.steady{color:var(--green);white-space:nowrap}
td svg.cell{display:block;min-width:104px;margin-top:2px;overflow:visible}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(460px,1fr));gap:16px}
.points tbody th{min-width:130px}.points td:nth-child(2){width:38%}
.points{display:grid;grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:0 20px}
.plot{display:block;width:100%;height:auto}.plot.narrow{max-width:480px}
.plot.narrow{display:none}
.plot text,.cell text{font-size:12px;fill:var(--soft)}
.plot .label{fill:var(--ink);paint-order:stroke;stroke:var(--page);stroke-width:3px;stroke-linejoin:round}
.plot .label.shipped{font-weight:700}.plot .axis-title{fill:var(--ink);font-weight:600}
.end{text-anchor:end}.middle{text-anchor:middle}
.grid{stroke:var(--line);stroke-width:.6}.axis{stroke:var(--grey);stroke-width:1}
.over{fill:var(--over)}.budget{stroke:var(--orange);stroke-width:1.3;stroke-dasharray:5 3}
.plot .budget-text{fill:var(--orange)}
.leader{stroke:var(--grey);stroke-width:.8}
.disc,.dot.shipped,.arrow.shipped{fill:var(--blue)}.halo{fill:none;stroke:var(--blue);stroke-width:1.5}
.ring{fill:var(--page);stroke:var(--green);stroke-width:2.2}.cross{fill:none;stroke:var(--orange);stroke-width:2.6}
.range{stroke-width:2.4}.range.shipped{stroke:var(--blue)}
.range.held{stroke:var(--green)}.range.refused{stroke:var(--orange)}.range.not-built{stroke:var(--grey)}
.dot.held,.arrow.held{fill:var(--green)}.dot.refused,.arrow.refused{fill:var(--orange)}
.bar{fill:var(--grey)}.bar.shipped{fill:var(--blue)}.bar.float{fill:var(--soft)}
.bar.shaky{fill-opacity:.35;stroke:var(--grey);stroke-dasharray:3 2}.bar.shipped.shaky{stroke:var(--blue)}
.reference{stroke:var(--ink);stroke-width:1.6}
.legend{display:flex;flex-wrap:wrap;gap:4px 20px;align-items:center;max-width:none}
.legend span{display:inline-flex;align-items:center;gap:6px}
.map td{text-align:center;padding:5px 6px;border-left:1px solid var(--line);min-width:62px}
.swatch{display:inline-block;min-width:52px;padding:1px 6px;border-radius:4px;text-align:center;font-size:.8rem}
.swatch.int8,.swatch.int4{background:var(--pale);color:var(--ink)}
.swatch.fp32,.swatch.fp16{background:var(--orange);color:var(--page);font-weight:650}
.swatch.bf16{background:var(--green);color:var(--page);font-weight:650}
pre{background:var(--card);border-radius:8px;padding:12px 16px;overflow-x:auto;font-size:.85rem;line-height:1.45}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
p code,td code{overflow-wrap:anywhere}
details{border:1px solid var(--line);border-radius:8px;padding:8px 14px;margin:12px 0}
summary{cursor:pointer;font-weight:600}
footer{margin-top:44px;color:var(--soft);font-size:.8rem;overflow-wrap:anywhere}
@media(max-width:700px){
main{padding:18px 14px 48px}
.headline{font-size:1.06rem}
.panels,.points{grid-template-columns:minmax(0,1fr)}
.tiles{grid-template-columns:1fr 1fr}.tile{padding:10px 12px}.tile b{font-size:1.25rem}
th,td{padding:5px 9px}
caption span{display:block;position:sticky;left:12px;max-width:calc(100vw - 56px)}
.plot.wide-plot{display:none}.plot.narrow{display:block}
tbody th{position:sticky;left:0;background:var(--page);max-width:42vw;overflow-wrap:anywhere;white-space:normal;min-width:96px}.points tbody th{min-width:96px}
tr.shipped th{background:var(--card)}
}
@media print{.scroll{overflow:visible;border:0}}
"""
