//! What the tests share.

pub(crate) mod binary;
pub(crate) mod case;
pub(crate) mod collector;
pub(crate) mod edge;
pub(crate) mod events;
pub(crate) mod gate;
pub(crate) mod page;
pub(crate) mod prober;
pub(crate) mod store;
pub(crate) mod tier;
pub(crate) mod vendor;
pub(crate) mod vendor_rows;
