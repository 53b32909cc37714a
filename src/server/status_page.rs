//! The status as an HTML page without scripts, for small and large screens. maud escapes all values.

use maud::{DOCTYPE, Markup, PreEscaped, html as markup};

use crate::{
    domain::duration,
    telemetry::status::{
        Certificate, Changed, DecisionCount, Document, Provider, Recent, RefusedConnection, Status, UndecidedCall, WINDOW,
        printable,
    },
};
use std::time::Duration;

/// The style, for light and dark. Text has a contrast of at least 7 to 1. On a narrow screen each row becomes a block and each cell shows its
/// column's name, so that nothing is cut off or scrolls sideways.
const STYLE: &str = "
:root{color-scheme:light dark;--bg:#fff;--fg:#16191d;--dim:#454c55;--line:#c4cad1;--bad:#8f0f0f;--badbg:#fdecec;--good:#0b5226;--card:#f5f6f8}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#eef0f2;--dim:#b9c0c8;--line:#454c55;--bad:#ffb3b3;--badbg:#3a1616;--good:#9be3b4;--card:#1d2125}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:90rem;padding:1rem;background:var(--bg);color:var(--fg);font:1rem/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.35rem;margin:0 0 .25rem}h2{font-size:1.1rem;margin:1.75rem 0 .5rem}
p{margin:.25rem 0}.dim{color:var(--dim)}.bad{color:var(--bad);font-weight:600}.good{color:var(--good);font-weight:600}
ul.attention{list-style:none;margin:.75rem 0;padding:0}
ul.attention li{background:var(--badbg);border-left:.35rem solid var(--bad);padding:.5rem .75rem;margin:.4rem 0;white-space:pre-line}
.ok{border-left:.35rem solid var(--good);background:var(--card);padding:.5rem .75rem;margin:.75rem 0}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;vertical-align:top;padding:.35rem .6rem .35rem 0;border-bottom:1px solid var(--line)}
th{color:var(--dim);font-weight:600;overflow-wrap:normal}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
code,.id{font-family:ui-monospace,monospace;font-size:.9em}
@media(min-width:60.01rem){.w{white-space:nowrap}}
@media(max-width:60rem){thead{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
table,tbody,tr,td{display:block;width:100%}tr{background:var(--card);margin:.5rem 0;padding:.4rem .6rem;border:1px solid var(--line)}
td,td.n{border:0;padding:.12rem 0;text-align:left}td:empty{display:none}td[data-of]::before{content:attr(data-of) \": \";color:var(--dim)}}
";

/// How many refused peers the page shows. The JSON has all.
const REFUSED_SHOWN: usize = 25;
/// How many kinds of calls without a decision the page shows. The JSON has all.
const UNDECIDED_SHOWN: usize = 25;

/// How many changes the page shows. The JSON has all.
const CHANGES_SHOWN: usize = 25;

/// The whole page.
pub(super) fn html(status: &Status) -> String {
    let Status { version, revision, as_of, started_at, .. } = status;
    let page = markup! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "byok-gate: " (headline(status)) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { "byok-gate " (text(version)) @if !revision.is_empty() { " (" (text(revision)) ")" } }
                    p.dim { "As of " (text(as_of)) ", up since " (text(started_at)) ". The same as " a href="/status.json" { "JSON" } "; numbers in " a href="/metrics" { "metrics" } "." }
                }
                main {
                    (attention(status))
                    (documents(status))
                    (certificates(&status.certificates))
                    (providers(status))
                    (decisions(status))
                    (refused(&status.refused_connections))
                    (undecided(&status.undecided_calls))
                    (changes(&status.changes))
                    (recent("Last denials", "denials", &status.denials))
                    (recent("Last unverified allows", "unverified", &status.unverified_allows))
                }
            }
        }
    };
    page.into_string()
}

fn headline(status: &Status) -> String {
    match status.attention.len() {
        0 => "nothing needs attention".to_owned(),
        1 => "1 thing needs attention".to_owned(),
        many => format!("{many} things need attention"),
    }
}

fn attention(status: &Status) -> Markup {
    markup! {
        @if status.attention.is_empty() {
            p.ok { span.good { "Nothing needs attention." } }
        } @else {
            p.bad { (headline(status)) }
            ul.attention {
                @for item in &status.attention {
                    li { strong { (lines(&item.what)) } br; (text(&item.remedy)) "." }
                }
            }
        }
    }
}

fn documents(status: &Status) -> Markup {
    markup! {
        h2 { "What is in force" }
        table id="documents" {
            thead { tr { th { "Document" } th { "Revision" } th { "From" } th { "Read" } th { "Last reload" } } }
            tbody {
                @for Document { document, revision, source, loaded_at, age_seconds, last_reload_error, last_reload_failed_at } in &status.documents {
                    tr {
                        td { strong { (text(document)) } }
                        td.id data-of="Revision" { (text(revision)) }
                        td data-of="From" { (text(source)) }
                        td data-of="Read" { (ago(*age_seconds)) " (" (text(loaded_at)) ")" }
                        td data-of="Last reload" {
                            @if last_reload_error.is_empty() { "good" } @else { span.bad { "failed at " (text(last_reload_failed_at)) ": see above" } }
                        }
                    }
                }
            }
        }
    }
}

fn certificates(certificates: &[Certificate]) -> Markup {
    markup! {
        @if !certificates.is_empty() {
            h2 { "Certificates" }
            table id="certificates" {
                thead { tr { th { "Setting" } th { "File" } th { "Expires" } } }
                tbody {
                    @for Certificate { setting, file, ends_at, seconds_left } in certificates {
                        tr {
                            td { strong { (text(setting)) } }
                            td data-of="File" { (text(file)) }
                            td data-of="Expires" {
                                (text(ends_at))
                                @if *seconds_left <= 0 { " " span.bad { "it has expired" } }
                                @else { " (in " (rough(seconds_left.unsigned_abs())) ")" }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn providers(status: &Status) -> Markup {
    let (quiet, seen): (Vec<&Provider>, Vec<&Provider>) = status.providers.iter().partition(|provider| provider.is_quiet());
    markup! {
        h2 { "Providers" }
        @if !seen.is_empty() {
            table id="providers" {
                thead {
                    tr {
                        th { "Provider" } th { "Enforced" } th { "Breaker" } th { "Probes" } th { "Verdicts of the last " (window(status)) }
                        th { "Made-up keys" } th { "Last failure" }
                    }
                }
                tbody { @for provider in seen { (row_of(provider)) } }
            }
        }
        @if !quiet.is_empty() {
            p.dim { "Not asked about since the start: " (text(&quiet.iter().map(|it| it.provider.as_str()).collect::<Vec<_>>().join(", "))) }
        }
    }
}

fn row_of(provider_row: &Provider) -> Markup {
    let Provider {
        provider,
        enforcement,
        until,
        breaker: _,
        breaker_open_for_organizations: _,
        probes_in_flight,
        probes_queued,
        recent_verdicts,
        calibration,
        no_api_at,
        last_failure,
    } = provider_row;
    let breaker_text = provider_row.breaker_text();
    let is_enforced = enforcement == "enforce";
    markup! {
        tr {
            td { strong { (text(provider)) } }
            td data-of="Enforced" {
                @if is_enforced { "yes" } @else { span.bad { (text(enforcement)) " until " (text(until)) } }
            }
            td.w data-of="Breaker" {
                @if breaker_text.starts_with("open") { span.bad { (breaker_text) } } @else { (text(&breaker_text)) }
            }
            td data-of="Probes" {  (probes_in_flight) " running, " (probes_queued) " waiting" }
            td.w data-of="Verdicts" {
                @for (verdict, count) in recent_verdicts { div { (text(verdict)) " " (count) } }
                @if recent_verdicts.is_empty() { "none" }
            }
            td data-of="Made-up keys" {
                @for it in calibration { div { (text(it.text())) ": " (text(&it.host)) ", " (text(&it.probe)) " in " (text(&it.header)) } }
                @for host in no_api_at { div.bad { "no API at " (text(host)) } }
                @if calibration.is_empty() && no_api_at.is_empty() { "not asked" }
            }
            td data-of="Last failure" {
                @if let Some(failure) = last_failure { strong { (text(&failure.verdict)) } " at " (text(&failure.at)) ": " (text(&failure.cause)) }
                @else { "none" }
            }
        }
    }
}

fn decisions(status: &Status) -> Markup {
    markup! {
        h2 { "Decisions" }
        @if status.decisions.is_empty() {
            p.dim { "None yet." }
        } @else {
            table id="decisions" {
                thead { tr { th { "Outcome" } th { "Code" } th.n { "Last " (window(status)) } th.n { "Since the start" } } }
                tbody {
                    @for DecisionCount { outcome, code, total, recent } in &status.decisions {
                        tr {
                            td { strong { (text(outcome)) } }
                            td data-of="Code" { (text(code)) }
                            td.n data-of="Lately" { (recent) }
                            td.n data-of="Since the start" { (total) }
                        }
                    }
                }
            }
        }
    }
}

fn refused(connections: &[RefusedConnection]) -> Markup {
    markup! {
        @if !connections.is_empty() {
            h2 { "Refused connections" }
            table id="refused" {
                thead { tr { th { "Last" } th { "Peer" } th.n { "Count" } th { "Why" } th { "Names in its certificate" } } }
                tbody {
                    @for RefusedConnection { at, fault, peer, count, names, meaning } in connections.iter().take(REFUSED_SHOWN) {
                        tr {
                            td.w data-of="Last" { (text(at)) }
                            td.w data-of="Peer" { (text(peer)) }
                            td.n data-of="Count" { (count) }
                            td data-of="Why" { strong { (text(fault)) } ": " (text(meaning)) }
                            td data-of="Names" { (text(&names.join(", "))) }
                        }
                    }
                }
            }
        }
    }
}

fn undecided(calls: &[UndecidedCall]) -> Markup {
    markup! {
        @if !calls.is_empty() {
            h2 { "Calls without a decision" }
            table id="undecided" {
                thead { tr { th { "Last" } th { "Peer, caller" } th.n { "Count" } th { "Why" } th { "Method" } } }
                tbody {
                    @for UndecidedCall { at, method, grpc_code, reason, peer, caller, report_only, count } in calls.iter().take(UNDECIDED_SHOWN) {
                        tr {
                            td.w data-of="Last" { (text(at)) }
                            td.w data-of="Peer" { (text(peer)) @if !caller.is_empty() { ", " (text(caller)) } }
                            td.n data-of="Count" { (count) }
                            td data-of="Why" { strong { (text(grpc_code)) } ": " (text(reason)) }
                            td data-of="Method" { (text(method)) @if *report_only { " (report only)" } }
                        }
                    }
                }
            }
        }
    }
}

fn changes(changes: &[Changed]) -> Markup {
    markup! {
        @if !changes.is_empty() {
            h2 { "Last changes" }
            table id="changes" {
                thead { tr { th { "When" } th { "What" } } }
                tbody {
                    @for change in changes.iter().take(CHANGES_SHOWN) {
                        tr {
                            td.w data-of="When" { (text(&change.at)) }
                            td data-of="What" { (text(&change.text())) }
                        }
                    }
                }
            }
        }
    }
}

fn recent(title: &str, id: &str, entries: &[Recent]) -> Markup {
    let with_ids = entries.iter().any(|entry| !entry.workspace_id.is_empty());
    markup! {
        h2 { (title) }
        @if entries.is_empty() {
            p.dim { "None since the start." }
        } @else {
            table id=(id) {
                thead {
                    tr {
                        th { "When" } th { "Code or verdict" } th { "Runtime, model" } th { "Provider, host" } th { "Why" }
                        @if with_ids { th { "Workspace" } }
                        th { "Decision" }
                    }
                }
                tbody {
                    @for entry in entries {
                        tr {
                            td.w data-of="When" { (text(&entry.at)) }
                            td.w {
                                @if !entry.code.is_empty() { div { strong { (text(&entry.code)) } } }
                                @if !entry.verdict.is_empty() { div { (text(&entry.verdict)) } }
                                div.dim { (text(&entry.checkpoint)) @if entry.report_only { ", report only" } }
                            }
                            td data-of="Runtime, model" { (text(&entry.runtime)) ", " (text(&entry.model)) }
                            td data-of="Provider, host" { (text(&entry.provider)) @if !entry.host.is_empty() { ", " (text(&entry.host)) } }
                            td data-of="Why" { (text(&entry.cause)) }
                            @if with_ids { td data-of="Workspace" { (text(&entry.workspace_id)) } }
                            td.id data-of="Decision" { (text(&entry.decision_id)) }
                        }
                    }
                }
            }
        }
    }
}

/// One line of text from outside, isolated so that its writing direction affects nothing else.
fn text(words: &str) -> Markup {
    markup! { bdi { (printable(words)) } }
}

/// Several such lines.
fn lines(words: &str) -> Markup {
    markup! { @for (at, line) in words.lines().enumerate() { @if at > 0 { br; } (text(line)) } }
}

fn window(status: &Status) -> String {
    rough(status.window_seconds.min(WINDOW.as_secs()))
}

fn ago(seconds: u64) -> String {
    format!("{} ago", rough(seconds))
}

/// A duration in at most its two largest units.
fn rough(seconds: u64) -> String {
    let unit = match seconds {
        0..3600 => 1,
        3600..86_400 => 60,
        _ => 3600,
    };
    let (days, rest) = (seconds / 86_400, seconds % 86_400 / unit * unit);
    match (days, rest) {
        (0, rest) => duration::text(Duration::from_secs(rest)),
        (days, 0) => format!("{days}d"),
        (days, rest) => format!("{days}d {}", duration::text(Duration::from_secs(rest))),
    }
}
