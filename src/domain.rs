//! Layer 0: the types of requests and answers. Plain data without effects.

pub mod causes;
pub mod decision;
pub mod denial;
mod denial_text;
pub mod duration;
pub mod problem;
pub mod protocol;
pub mod request;
pub mod secret;
pub mod similar;
pub mod verdict;
