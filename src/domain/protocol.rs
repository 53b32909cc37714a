//! How a provider is spoken to: its API, the method, and the header that carries the credential.

use strum::{EnumString, IntoStaticStr, VariantArray};

/// The closed name of the provider that the platform pays for.
pub const PLATFORM: &str = "platform";

/// The API that a provider speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// OpenAI's.
    OpenAi,
    /// Anthropic's.
    Anthropic,
}

/// A request's method.
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

/// Which of a provider's surfaces a request is for.
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
    /// Its name on the wire.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

impl HeaderFamily {
    /// Its name in the catalogue.
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
}

impl Surface {
    /// Its name in the catalogue.
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// A model is called there: the workspace's own kind of call.
    pub const fn is_inference(self) -> bool {
        match self {
            Self::Models | Self::KeyInformation => false,
            Self::ChatCompletions | Self::Responses | Self::Messages | Self::GenerateContent => true,
        }
    }

    /// What a request with this path is for, as the paths of the known APIs end.
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
