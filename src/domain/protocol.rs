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

// === impl Method, HeaderFamily ===

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
