//! Which of several names was probably meant.

/// The name that is most like the one that was given, and how like it is. Of equally likely ones, the last.
pub fn most_similar<'n>(names: impl Iterator<Item = &'n str>, likeness: impl Fn(&str) -> f64) -> Option<(&'n str, f64)> {
    names.map(|name| (name, likeness(name))).max_by(|one, other| one.1.total_cmp(&other.1))
}
