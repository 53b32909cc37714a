package com.byokgate.example;

import java.util.Objects;

/** A credential's value, which nothing prints or serializes by accident. {@link #reveal} gives it away. */
public final class Secret {
    /** The value of a row that exists but could not be read or decrypted. Never leave such a row out: that would say that there is none. */
    public static final Secret UNREADABLE = new Secret("");

    // Transient, so that Gson and whatever else goes by fields leave it out. There is no getter for what goes by getters.
    private final transient String value;

    public Secret(String value) {
        this.value = text(Objects.requireNonNull(value, "a secret is never null; UNREADABLE is one that could not be read"));
    }

    public String reveal() {
        return value;
    }

    @Override
    public String toString() {
        return "[redacted]";
    }

    /** What a proto string can hold. Half a surrogate pair becomes U+FFFD, which is in no key and no name: byok-gate refuses it. */
    static String text(String given) {
        return given.replaceAll("\\p{Cs}", "\uFFFD");
    }
}
