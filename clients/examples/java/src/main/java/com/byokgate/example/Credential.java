package com.byokgate.example;

import com.byokgate.v1.Scope;

/** One row of the secret store. */
public record Credential(String envName, Scope scope, Secret value) {}
