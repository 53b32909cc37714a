//! How a provider is called: its API, the HTTP method, and the header that carries the credential.

use strum::{EnumString, IntoStaticStr, VariantArray};

/// The name of the provider that the platform pays for. It is reserved.
pub const PLATFORM: &str = "platform";

/// The API that a provider speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// OpenAI's API.
    OpenAi,
    /// Anthropic's API.
    Anthropic,
}

/// An HTTP method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumString, IntoStaticStr)]
#[strum(serialize_all = "UPPERCASE")]
pub enum Method {
    /// GET.
    Get,
    /// POST.
    Post,
}

/// The header that carries the credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "kebab-case")]
pub enum HeaderFamily {
    /// `Authorization: Bearer KEY`.
    Bearer,
    /// `x-api-key: KEY`.
    XApiKey,
    /// `x-goog-api-key: KEY`.
    XGoogApiKey,
    /// `api-key: KEY`.
    ApiKey,
}

/// The part of a provider's API that a request calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "kebab-case")]
pub enum Surface {
    /// The list of models.
    Models,
    /// Information about the key, its account or its balance.
    KeyInformation,
    /// OpenAI's chat completions.
    ChatCompletions,
    /// OpenAI's responses.
    Responses,
    /// Anthropic's messages.
    Messages,
    /// Google's own generateContent.
    GenerateContent,
}

// === impl Method, HeaderFamily, Surface ===

impl Method {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

impl HeaderFamily {
    /// The name in the catalogue.
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// The header's name on the wire.
    pub fn header(self) -> &'static str {
        match self {
            Self::Bearer => "authorization",
            Self::XApiKey | Self::XGoogApiKey | Self::ApiKey => self.as_str(),
        }
    }

    /// The header for a person, as it follows "in".
    pub fn text(self) -> String {
        match self {
            Self::Bearer => "`Authorization: Bearer`".to_owned(),
            Self::XApiKey | Self::XGoogApiKey | Self::ApiKey => format!("the header `{}`", self.header()),
        }
    }
}

impl Surface {
    /// The name in the catalogue.
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// Whether it calls a model, as a workspace does.
    pub const fn is_inference(self) -> bool {
        match self {
            Self::Models | Self::KeyInformation => false,
            Self::ChatCompletions | Self::Responses | Self::Messages | Self::GenerateContent => true,
        }
    }

    /// The surface of a path, by how the paths of the known APIs end.
    pub fn of_path(path: &str) -> Self {
        let path = path.split('?').next().unwrap_or(path).trim_end_matches('/');
        match path.rsplit('/').next().unwrap_or_default() {
            "models" => Self::Models,
            "completions" => Self::ChatCompletions,
            "responses" => Self::Responses,
            "messages" | "count_tokens" => Self::Messages,
            last if last.ends_with(":generateContent") || last.ends_with(":streamGenerateContent") => Self::GenerateContent,
            _ => Self::KeyInformation,
        }
    }
}
