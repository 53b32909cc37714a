package com.byokgate.example;

import com.byokgate.v1.Checkpoint;
import com.byokgate.v1.Scope;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;

/**
 * Makes one call, and prints what a platform would log and answer: {@code Example TARGET RUNTIME MODEL [NAME ...]}.
 *
 * <p>Each NAME is a credential's, and its value is read from the environment. Exits 0 if the workspace may start.
 */
public final class Example {
    public static void main(String[] arguments) throws Exception {
        List<Credential> held = new ArrayList<>();
        for (String name : Arrays.asList(arguments).subList(3, arguments.length)) {
            String value = System.getenv(name);
            if (value != null) {
                held.add(new Credential(name, Scope.SCOPE_WORKSPACE, new Secret(value)));
            }
        }
        Answer answer;
        try (Gate gate = new Gate(arguments[0], Gate.Options.DEFAULT)) {
            answer = gate.decide(Spec.of(arguments[1], arguments[2], held), Checkpoint.CHECKPOINT_CREATE);
        }
        System.out.println(answer);
        if (answer instanceof Answer.Refusal refusal) {
            System.out.printf("HTTP %d %s%n%s%n", refusal.httpStatus(), refusal.httpHeaders(), refusal.message());
            System.exit(1);
        }
        // Only here a platform writes the workspace's row, with the billing mode of Answer.Allowed.
    }

    private Example() {}
}
