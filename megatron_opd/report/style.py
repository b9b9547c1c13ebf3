"""The style sheet of the report: light and dark, for wide and narrow windows, without anything from elsewhere."""

from megatron_opd.report.figures import COLOURS, GRID, INK, MUTED

DARK_COLOURS = ("#6fa8ee", "#ef8f62", "#67c98b", "#cf92e3", "#dcb04b", "#4fc9c9", "#f07f9e", "#b0b0b0")


def style_sheet() -> str:
    """CSS for the page, with the variables that the figures use."""
    light = ";".join(f"--run-{i}:{colour}" for i, colour in enumerate(COLOURS))
    dark = ";".join(f"--run-{i}:{colour}" for i, colour in enumerate(DARK_COLOURS))
    return (
        f":root{{color-scheme:light dark;--ink:{INK};--muted:{MUTED};--grid:{GRID};{light};{LIGHT}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{DARK};{dark}}}}}{RULES}"
    )


LIGHT = "--page:#f6f6f7;--card:#ffffff;--line:#e1e1e5;--weight:214 140 0;--more:38 132 96;--less:206 62 48"
DARK = (
    "--ink:#e6e6e9;--muted:#9b9ca3;--grid:#34353b;--page:#16171a;--card:#1e1f24;--line:#303138;"
    "--weight:232 170 40;--more:70 178 132;--less:232 92 78"
)
RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main{max-width:1240px;margin:0 auto;padding:0 28px}
header{padding-top:34px}
h1{font-size:26px;margin:0 0 2px;letter-spacing:-.01em}
h2{font-size:20px;margin:44px 0 4px;letter-spacing:-.01em}
h3{font-size:13px;margin:26px 0 10px;color:var(--muted);font-weight:600;text-transform:uppercase;letter-spacing:.06em}
h4{font-size:15px;margin:22px 0 8px}
p{max-width:76ch;margin:4px 0 12px}
.note{color:var(--muted);font-size:13px}
nav{position:sticky;top:0;z-index:2;background:var(--page);border-bottom:1px solid var(--line);margin-top:16px}
nav div{max-width:1240px;margin:0 auto;padding:9px 28px;display:flex;gap:8px 22px;flex-wrap:wrap;font-size:14px}
nav a{color:var(--muted);text-decoration:none}
nav a:hover{color:var(--ink)}
nav .key{margin-left:auto;display:flex;gap:6px 18px;flex-wrap:wrap}
section{scroll-margin-top:48px}
.dot{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(350px,100%),1fr));gap:16px}
figure{display:flex;flex-direction:column;margin:0;
background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px 6px}
figcaption b{display:block;font-size:14px;font-weight:600}
figcaption span{display:block;font-size:12px;line-height:1.35;color:var(--muted);min-height:1.35em}
figure svg{display:block;width:100%;height:auto;stroke-linejoin:round;stroke-linecap:butt;margin-top:auto}
figure svg text{font-family:system-ui,-apple-system,"Segoe UI",sans-serif}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:8px 14px;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child>*{border-bottom:0}
th:first-child,td:first-child,.model{white-space:nowrap}
thead th{font-weight:600;color:var(--muted);font-size:12.5px;white-space:nowrap}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
td code{overflow-wrap:anywhere}
.bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:10px 14px;align-items:center;font-size:14px;
background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;margin-bottom:16px}
.bar{display:flex;height:22px;border-radius:5px;overflow:hidden;background:var(--grid);gap:1px}
.bar i{display:block}
.phases{grid-column:1/-1;display:flex;gap:6px 20px;flex-wrap:wrap;font-size:13px;color:var(--muted)}
details{margin:6px 0}
summary{cursor:pointer;color:var(--muted);font-size:13px}
article{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px;margin-bottom:12px}
article pre{margin:6px 0;max-height:16em;overflow:auto}
article p{margin:8px 0 0}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
.tokens{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.85 ui-monospace,SFMono-Regular,Menlo,Consolas,
"DejaVu Sans Mono",monospace;max-width:110ch}
.tokens span{border-radius:3px;padding:2px 0}
.tokens i{font-style:normal;color:var(--muted);opacity:.7}
.tokens .out{color:var(--muted);text-decoration:underline dotted}
.tokens span:hover{outline:1px solid var(--ink)}
.choose{display:flex;gap:8px 20px;flex-wrap:wrap;align-items:center;font-size:14px;margin:10px 0 2px}
.choose label{cursor:pointer}
.scale{display:inline-flex;align-items:center;gap:8px;color:var(--muted);font-size:13px}
.scale i{display:inline-block;width:120px;height:11px;border-radius:3px}
.scale .g{background:linear-gradient(90deg,rgb(var(--less)/.8),transparent,rgb(var(--more)/.8))}
.scale .w{background:linear-gradient(90deg,transparent,rgb(var(--weight)/.75))}
#samples:has(#by-gap:checked) .less{background:rgb(var(--less)/calc(var(--g,0)*.8))}
#samples:has(#by-gap:checked) .more{background:rgb(var(--more)/calc(var(--g,0)*.8))}
#samples:has(#by-weight:checked) .tokens span{background:rgb(var(--weight)/calc(var(--w,0)*.75))}
#samples:has(#by-gap:checked) .scale.of-weight,#samples:has(#by-weight:checked) .scale.of-gap,
#samples:has(#by-none:checked) .scale{display:none}
footer{max-width:1240px;margin:50px auto 30px;padding:0 28px;color:var(--muted);font-size:13px}
@media (max-width:640px){header,main,nav div{padding-left:14px;padding-right:14px}th,td{padding:7px 9px}}
@media print{nav{display:none}figure,article{break-inside:avoid}}
"""
