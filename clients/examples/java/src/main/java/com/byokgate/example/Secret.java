package com.byokgate.example;

import java.util.Objects;

/** A credential's value, which nothing prints or serializes by accident. {@link #reveal} returns it. */
public final class Secret {
    /** The value of a row that exists but could not be read or decrypted. Never leave such a row out: that would mean that there is none. */
    public static final Secret UNREADABLE = new Secret("");

    // Transient, so that Gson and other tools that read fields skip it. Tools that read getters find none.
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

    /** What a proto string can hold. Half a surrogate pair becomes U+FFFD, which byok-gate refuses in keys and names. */
    static String text(String given) {
        return given.replaceAll("\\p{Cs}", "\uFFFD");
    }
}
