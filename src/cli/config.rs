//! `byok-gate config`: shows all settings and where each came from.

use clap::Args;
use serde_json::{Map, Value, json};

use super::{
    exit::{Exit, Format, print},
    serve::ServeArgs,
};
use crate::config::{self, Origin};

#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    /// The output format.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    #[command(flatten)]
    serve: ServeArgs,
}

/// Shows the settings of `serve` with the same flags. Files with secrets are named but not read.
pub(super) fn run(args: ConfigArgs) -> anyhow::Result<Exit> {
    let ConfigArgs { format, serve } = args;
    let (paths, overrides) = serve.layers();
    let (settings, origins) = config::settings_of(&paths, &overrides, std::env::vars())?;
    let rows = config::list_settings(&settings).into_iter().map(|(key, value)| {
        let from = origins.get(&key).unwrap_or(&Origin::Default).to_string();
        (key, value, from)
    });
    match format {
        Format::Json => {
            let whole: Map<String, Value> = rows.map(|(key, value, from)| (key, json!({"value": value, "from": from}))).collect();
            print(&format!("{}\n", serde_json::to_string_pretty(&whole)?))?;
        }
        Format::Text => {
            let rows: Vec<_> = rows.map(|(key, value, from)| (key, value.to_string(), from)).collect();
            let keys = rows.iter().map(|(key, _, _)| key.len()).max().unwrap_or(0);
            let values = rows.iter().map(|(_, value, _)| value.len()).max().unwrap_or(0).min(32);
            let lines: String = rows.iter().map(|(key, value, from)| format!("{key:keys$}  {value:values$}  {from}\n")).collect();
            print(&lines)?;
        }
    }
    Ok(Exit::Ok)
}
